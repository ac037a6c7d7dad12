"""Test that tools refuse damaged exported folders in one line, and never run code from a folder."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.hf.models import make
from tools.models.evaluate import main as evaluate
from tools.models.export import main as export
from tools.models.generate import main as generate
from tools.models.hf.tokenizer import generation_config

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]

WEIGHTS, NORM = "model.safetensors", "model.norm.weight"
NAN = float("nan")


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a small ReMoE with its tokenizer, and return the folder."""
    folder = tmp_path_factory.mktemp("exported")
    model, loaded = make("relu", vocab_size=264), AutoTokenizer.from_pretrained(tokenizer)
    for part in (model, loaded, generation_config(model.config, loaded)):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def set_field(field: str, value: Any) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {field: value}))

    return work


def open_with_all(folder: Path, capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Open the folder with each tool; assert that each fails in one line and asks nothing; return the errors."""
    errors = []
    for tool, words in (
        (generate, ["--prompt", "a"]),
        (evaluate, ["--data-path", "/nowhere"]),
        (export, ["--reverse", "--save", str(folder.parent / "out")]),
    ):
        capfd.readouterr()
        assert tool(["--load", str(folder), *words]) == 1
        output, error = capfd.readouterr()
        assert error.endswith(("[REMOE-E511]\n", "[REMOE-E513]\n")) and error.count("\n") == 1, error
        assert "[y/N]" not in output + error and not (folder.parent / "out").exists()
        errors.append(error)
    return errors


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return work


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


# Damage to the folder, and a word of the error message.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (change_tensors(lambda one: one.pop("model.layers.1.mlp.experts.down_proj")), "experts.down_proj"),
    "other shape": (change_tensors(lambda one: one.update({NORM: torch.ones(33)})), NORM),
    "not finite": (change_tensors(lambda one: one[NORM].fill_(NAN)), NORM),
    "pickle": (pickled, "safetensors"),
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS, 9_000), "cannot be read"),
    "too many experts": (set_field("max_experts_per_token", 9), "max_experts_per_token"),
    "quantized": (set_field("quantization_config", {"quant_method": "bitsandbytes"}), "config.json"),
    "a different model": (set_field("model_type", "llama"), "config.json"),
    "adapter": (write("adapter_config.json", "{}"), "adapter"),
    "tokenizer is empty": (write("tokenizer.json", "{}"), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, word = DAMAGE[name]
    damage(folder)
    assert all(word in error for error in open_with_all(folder, capfd))


def test_code_in_the_folder_is_not_run(folder: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code for model, tokenizer and generation is not run, nothing is asked, and broken settings are ignored."""
    for name in ("modeling_remoe.py", "configuration_remoe.py", "tokenization.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")
    set_field("auto_map", {"AutoConfig": "configuration_remoe.RemoeConfig", "AutoModel": "modeling_remoe.R"})(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text("{")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert generate(["--load", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert export(["--reverse", "--load", str(folder), "--save", str(folder.parent / "out")]) == 0
    assert sys.stdin.read() == "y\n" and not (folder.parent / "ran").exists()
    output, error = capfd.readouterr()
    assert "[y/N]" not in output + error and "Traceback" not in error
