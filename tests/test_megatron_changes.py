"""Test that changes in another Megatron are found: in a copy of the installed one with three changed files."""

import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("griffe", reason="needs griffelib: pip install griffelib")

from tests import megatron_changes  # noqa: E402

INSTALLED = Path(sysconfig.get_paths()["purelib"]) / "megatron"
# File of Megatron → the text to replace, its replacement, and the label and words that must be reported.
CHANGES = {
    "core/transformer/dot_product_attention.py": (
        "packed_seq_params: Optional[PackedSeqParams] = None,\n    )",
        "packed_seq_params: Optional[PackedSeqParams] = None,\n        sink=None,\n    )",
        "BREAKS",
        "does not take sink of megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
    ),
    "core/tensor_parallel/random.py": (
        "def model_parallel_cuda_manual_seed(\n    seed: int,",
        "def model_parallel_cuda_manual_seed(\n    seed: int, other: int,",
        "BREAKS",
        "model_parallel_cuda_manual_seed(other): Parameter was added as required",
    ),
    "core/utils.py": ("def get_model_config(", "def config_of_model(", "BREAKS", "utils.get_model_config is gone"),
    "core/transformer/moe/moe_logging.py": (  # a position that we pass by name
        "per_layer_logging: bool",
        "other: Any = None, per_layer_logging: bool",
        "",
        "report(per_layer_logging): Positional parameter was moved",
    ),
}


def link_installed(folder: Path) -> None:
    """Fill a folder with links to the installed Megatron's files."""
    for package in ("core", "training"):
        for file in (INSTALLED / package).rglob("*.py"):
            link = folder / "megatron" / file.relative_to(INSTALLED)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)


def test_changes_are_found(tmp_path: Path) -> None:
    link_installed(tmp_path)
    for name, (old, new, _, _) in CHANGES.items():
        file = tmp_path / "megatron" / name
        text = file.read_text()
        assert text.count(old) == 1, name
        file.unlink()
        file.write_text(text.replace(old, new))
    installed = megatron_changes.load(INSTALLED.parent)
    assert list(megatron_changes.look_at(installed, installed)) == []
    found = list(megatron_changes.look_at(installed, megatron_changes.load(tmp_path)))
    for _, _, label, said in CHANGES.values():
        assert any(label == one and said in text for one, text in found), found
    assert any(not label and "another body" in text and "DotProductAttention.forward" in text for label, text in found)
    behind = list(megatron_changes.look_at(installed, megatron_changes.load(tmp_path), megatron_changes.load(tmp_path)))
    assert ("BEHIND", "get_model_config") in [(one, text.split()[0].rpartition(".")[2]) for one, text in behind]
