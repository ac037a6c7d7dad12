"""Test that a checkpoint and an exported folder generate the same text, and that its cost is printed."""

import io
import re
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.hf.models import build_megatron, make
from tools.models import checkpoints
from tools.models.generate import main
from tools.models.hf.opening import open_model

pytestmark = [pytest.mark.usefixtures("process_groups"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def places(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a ReMoE as a run's checkpoint and as an exported folder, and a dense model as a folder."""
    root = tmp_path_factory.mktemp("models")
    model = make("relu", vocab_size=264, max_position_embeddings=24)
    own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer)}
    checkpoints.save(*build_megatron(model, **own), root / "run")
    names = ["input_ids", "token_type_ids", "attention_mask"]  # some tokenizers' default
    for name, one in {"folder": model, "dense": make("dense", vocab_size=264)}.items():
        one.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tokenizer, model_input_names=names).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def generate(capfd: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> tuple[str, str]:
    assert main([str(word) for word in words]) == code
    return capfd.readouterr()


def test_run_and_folder_say_the_same(places: dict[str, Path], capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--prompt=def f", "--max-new-tokens", "7"
    for how in (["--temperature", "0"], ["--seed", "5"]):
        texts = set()
        for place in ("run", "folder"):
            text, costs = generate(capfd, "--load", places[place], *words, *how)
            assert text.startswith("def f")
            match = re.search(r"(\d+) tokens, [\d.]+ tokens/s, ([\d.]+) experts per token and layer", costs)
            assert match and 1 <= int(match[1]) <= 7 and 0 < float(match[2]) < 8
            texts.add(text)
        assert len(texts) == 1
    greedy = (generate(capfd, "--load", places["folder"], *words, "--temperature", heat)[0] for heat in ("0", "1e-6"))
    assert len({*greedy}) == 1
    # Text stops at the end of the context. A byte that is not UTF-8 becomes three. Dense models print no experts.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo \xe9\n")))
    text, costs = generate(capfd, "--load", places["dense"], "--temperature", "0")
    assert text.startswith("one") and "\ntwo" in text
    assert [int(number) for number in re.findall(r"^(\d+) tokens", costs, re.MULTILINE)] == [29, 25]
    assert "experts" not in costs and costs.count("context of 32 tokens") == 2


def test_a_separator_ends_documents(places: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If documents end with the tokenizer's separator, a prompt gets none, and generation stops at it."""
    end = "<|endoftext|>"
    backend = AutoTokenizer.from_pretrained(places["folder"]).backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 256)])
    shutil.copytree(places["folder"], tmp_path / "separated")
    PreTrainedTokenizerFast(tokenizer_object=backend, sep_token=end).save_pretrained(tmp_path / "separated")
    words = "--prompt=def f", "--max-new-tokens", "7", "--temperature", "0"
    texts = [generate(capfd, "--load", place, *words)[0] for place in (tmp_path / "separated", places["folder"])]
    assert texts[0] == texts[1]
    assert open_model(tmp_path / "separated").model.generation_config.eos_token_id == 256


@pytest.mark.parametrize(("place", "words", "code"), [
    ("folder", ["--prompt", ""], "E501"),
    ("folder", ["--prompt", "a" * 24], "E501"),
    ("folder", ["--prompt", "a", "--ckpt-step", "1"], "E511"),
    ("run", ["--prompt", "a", "--ckpt-step", "7"], "E402"),
])  # fmt: skip
def test_refusals(place: str, words: list[str], code: str, places: dict[str, Path], capfd) -> None:
    text, errors = generate(capfd, "--load", places[place], *words, code=1)
    assert f"[REMOE-{code}]" in errors and "Traceback" not in errors and not text
