"""Test, with a changed copy of Megatron, that changes are found."""

import sysconfig
from pathlib import Path

import pytest

INSTALLED = Path(sysconfig.get_paths()["purelib"]) / "megatron"
# File of Megatron → the text to replace, its replacement, and the label and words that must be reported.
CHANGES = {
    "core/transformer/dot_product_attention.py": (
        "packed_seq_params: Optional[PackedSeqParams] = None,\n    )",
        "packed_seq_params: Optional[PackedSeqParams] = None,\n        sink=None,\n    )",
        "BREAKS",
        "does not accept sink of megatron.core.transformer.dot_product_attention.DotProductAttention.forward",
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


def write_changed(folder: Path, package: str, changes: dict[str, tuple[str, ...]]) -> None:
    """Fill a folder with links to the files of one package of the installed Megatron, and change some files."""
    for file in INSTALLED.glob(f"{package}/**/*.py"):
        link = folder / "megatron" / file.relative_to(INSTALLED)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    for name, (old, new, *_) in changes.items():
        file = folder / "megatron" / name
        text = file.read_text()
        assert text.count(old) == 1, name
        file.unlink()
        file.write_text(text.replace(old, new))


def test_changes_are_found(tmp_path: Path) -> None:
    pytest.importorskip("griffe", reason="needs griffelib: pip install griffelib")
    from tests import megatron_changes

    for package in ("core", "training"):
        write_changed(tmp_path, package, CHANGES if package == "core" else {})
    installed, changed = megatron_changes.load(INSTALLED.parent), megatron_changes.load(tmp_path)
    assert list(megatron_changes.find_changes(installed, installed)) == []
    found = list(megatron_changes.find_changes(installed, changed))
    for _, _, label, said in CHANGES.values():
        assert any(label == one and said in text for one, text in found), found
    assert any(not label and "another body" in text and "DotProductAttention.forward" in text for label, text in found)
    behind = [text for label, text in megatron_changes.find_changes(installed, changed, changed) if label == "BEHIND"]
    assert any("utils.get_model_config is gone" in text for text in behind)
