"""Test, with changed copies of Megatron, that changes are found and that #7418 does not affect this project."""

import sysconfig
from pathlib import Path

import pytest

from megatron.training import global_vars
from tests.entry import Entry, shared_entry
from tests.tiny_model import RELU
from tests.training_runs import REPOSITORY, TINY, records

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
# The effect of #7418 without its sources: `parse_and_validate_args` no longer starts services.
SPLIT = {
    "training/global_vars.py": (
        "    set_args(args)\n",
        "    set_args(args)\n    initialize_runtime_services(args, build_tokenizer)\n\n\n"
        "def initialize_runtime_services(args, build_tokenizer=True):\n",
    ),
    "training/arguments.py": ("import set_global_variables\n", "import set_args as set_global_variables\n"),
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


@pytest.mark.skipif(hasattr(global_vars, "initialize_runtime_services"), reason="this Megatron has #7418's split")
def test_services_start_apart_from_parsing(data: Path, tmp_path: Path) -> None:
    write_changed(tmp_path, "training", SPLIT)
    flags = [*TINY, *RELU, *f"--data-path {data} --train-iters 3 --cpu".split()]
    programs = {"pretrain_gpt.py": [], "examples/own_training_script.py": []}
    programs["tools/__main__.py"] = ["cost", "--gpus", "2", "--"]
    split_entry = Entry(PYTHONPATH=str(tmp_path))
    try:
        for program, words in programs.items():
            results = [one.run([*words, *flags], script=REPOSITORY / program) for one in (shared_entry(), split_entry)]
            (code, released), (split_code, split) = results
            assert code == split_code == 0, split[-3000:]
            assert (records(split) or split) == (records(released) or released)
    finally:
        split_entry.process.kill()
