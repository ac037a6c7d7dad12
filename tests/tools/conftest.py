"""Provide a byte-level GPT-2 vocabulary, which loads fast."""

from pathlib import Path

import pytest

from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tools.text.corpora.dataset import byte_level_vocabulary


@pytest.fixture(scope="session")
def byte_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the vocabulary file and the merge file."""
    return byte_level_vocabulary(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def tokenizer(byte_files: tuple[Path, Path]) -> Path:
    """Return a folder with the tokenizer of `byte_files` for transformers."""
    return gpt2_tokenizer_folder(*byte_files)
