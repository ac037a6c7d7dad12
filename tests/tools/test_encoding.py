"""Test that text gets the token ids of transformers, whatever gigatoken does."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder
from tests.gpt2_reference import gpt2_files, random_text, transformers_tokenizer
from tools.text.preprocessing import encoding
from tools.text.preprocessing.encoding import gpt2_encoder


def test_every_character_of_the_first_planes() -> None:
    """The sample includes characters whose class differs between the two libraries' versions of Unicode."""
    encoder = gpt2_encoder(*gpt2_files())
    generator = random.Random(11)
    characters = [chr(i) for i in (*range(0xD800), *range(0xF900, 0x12000), *range(0x1F000, 0x1FB00))]
    characters = generator.sample(characters, 5_000) + ["\u088f", "\ua7ce", "\U00010940", "\U00011db0"]
    texts = [f"{c}'s {c}1 a{c}" for c in characters]
    reference = transformers_tokenizer(str(gpt2_tokenizer_folder(*gpt2_files())))
    assert [ids.tolist() for ids in encoder.encode(texts).documents()] == reference(texts).input_ids
    assert encoder.engine == "gigatoken"


def test_memory_is_given_back(monkeypatch) -> None:
    monkeypatch.setattr(encoding, "CHARACTERS_BETWEEN_RESTARTS", 1000)
    encoder = gpt2_encoder(*gpt2_files())
    generator = random.Random(5)
    texts = [Path(random.__file__).read_text(), *(random_text(generator) for _ in range(50))]
    first, before = encoder.encode(texts), encoder._fast
    assert np.array_equal(first.ids, encoder.encode(texts).ids) and encoder._fast is not before


@pytest.mark.parametrize("how", ["absent", "wrong"])
def test_gigatoken_that_does_not_work(how, byte_files, tokenizer, capsys, monkeypatch) -> None:
    """A single warning gives the reason, and the ids are right."""
    import gigatoken

    encode_batch = gigatoken.Tokenizer.encode_batch

    def wrong(self: gigatoken.Tokenizer, texts: list[str], parallel: bool) -> object:
        return encode_batch(self, [text.replace("import", "export") for text in texts], parallel=parallel)

    if how == "absent":
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    else:
        monkeypatch.setattr(gigatoken.Tokenizer, "encode_batch", wrong)
    texts, encoder = ["import this", "naïve", ""], gpt2_encoder(*byte_files)
    expected = transformers_tokenizer(str(tokenizer))(texts).input_ids
    with ThreadPoolExecutor(4) as pool:
        for encoded in pool.map(encoder.encode, [texts] * 8):
            assert [ids.tolist() for ids in encoded.documents()] == expected
    reason = {"absent": "import of gigatoken halted", "wrong": "it gives different ids for 'import this'"}[how]
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and encoder.engine == "tokenizers"
