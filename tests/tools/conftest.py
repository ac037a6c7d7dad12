"""Inputs and flags for tests of preprocessing."""

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.gpt2_reference import random_text
from tests.tools.jsonl import STRANGE
from tools.text.preprocessing import reading


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Return JSON lines with a title and a text each: real code, strange texts and random ones."""
    generator = random.Random(3)
    texts = [path.read_text() for path in sorted(Path(asyncio.__file__).parent.glob("*.py"))[:12]]
    texts += STRANGE + [random_text(generator) for _ in range(200)] + [""]
    texts = [texts[i] for i in generator.sample(range(len(texts)), len(texts))]
    return [
        json.dumps({"title": f"Nr. {i}", "text": text, "meta": {"a": [i]}}, ensure_ascii=i % 2 == 0)
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def byte_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a vocabulary of the 256 bytes, which loads fast, and return its two files."""
    return byte_level_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def byte_folder(byte_files: tuple[Path, Path]) -> str:
    """Return the folder of the same vocabulary for transformers."""
    return str(gpt2_tokenizer_folder(*byte_files, cache_dir=byte_files[0].parent))


@pytest.fixture(scope="module")
def flags(byte_files: tuple[Path, Path]) -> Callable[..., list[str]]:
    """Return a function that makes the tool's arguments, with the byte vocabulary unless `extra` names a tokenizer."""
    small = "--tokenizer-type GPT2BPETokenizer --vocab-file {} --merge-file {}".format(*byte_files)

    def make(output: Path, *inputs: Path | str, extra: str = "") -> list[str]:
        extra = extra if "--tokenizer-type" in extra else f"{small} {extra}"
        return ["--input", *map(str, inputs), "--output-prefix", str(output), "--workers", "2", *extra.split()]

    return make


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 10_000)
