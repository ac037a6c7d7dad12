"""Test GPT-2's vocabulary from two files, without network, in Megatron's own tokenizer."""

import json
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.remoe.files.errors import DataError
from megatron.remoe.training.gpt2_tokenizer import gpt2_tokenizer_folder, use_local_gpt2_files
from tests.gpt2_reference import gpt2_files, random_text
from tools.recipes.megatron_values import make_parser
from tools.text.corpora.dataset import byte_level_vocabulary

TEXT = "Hello world, it's 3.14!\n\n  naïve 漢字 👩‍👩‍👧 <|endoftext|> \x00\ttail  "


def test_megatron_builds_it_without_network(tmp_path, monkeypatch) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    attempts: list[object] = []  # also those whose error Megatron or transformers catches

    def refuse(*arguments: object, **options: object) -> None:
        attempts.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vocab_file, merge_file = gpt2_files()
    files = ["--vocab-file", str(vocab_file), "--merge-file", str(merge_file)]
    args = make_parser().parse_args(["--tokenizer-type", "GPT2BPETokenizer", *files])
    args.pad_vocab_size = False
    use_local_gpt2_files(args)
    assert args.tokenizer_type == "HuggingFaceTokenizer" and args.vocab_file is None and args.merge_file is None
    tokenizer = build_tokenizer(args)
    assert not attempts
    assert tokenizer.vocab_size == 50257 and tokenizer.eod == 50256
    assert tokenizer.tokenize("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT


def test_bytes_as_a_vocabulary(tmp_path, monkeypatch) -> None:
    from transformers import AutoTokenizer

    from tools.text.preprocessing.encoding import gpt2_encoder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = byte_level_vocabulary(tmp_path / "bytes")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_tokenizer_folder(*files))
    encoder = gpt2_encoder(*files)
    assert len(tokenizer) == encoder.vocabulary_size == 257 and tokenizer.eos_token_id == 256
    generator = random.Random(7)
    texts = ["", TEXT, "".join(map(chr, range(0x500))), *(random_text(generator) for _ in range(50))]
    encoded = encoder.encode(texts)
    start = 0
    for text, length in zip(texts, encoded.lengths, strict=True):
        ids = encoded.ids[start : start + length]
        start += length
        assert tokenizer(text).input_ids == ids.tolist()
        assert tokenizer.decode(ids.tolist()) == encoder.decode(ids) == text
        assert len(ids) == len(text.replace("<|endoftext|>", "e").encode())


END = "<|endoftext|>"
Tokens = dict[str, int]
WRONG: dict[str, Callable[[Tokens], Tokens]] = {  # part of the message → the vocabulary that has it
    r"<\|endoftext\|>.*256\)": lambda tokens: {token: number for token, number in tokens.items() if token != END},
    "ids": lambda tokens: tokens | {END: 300},
    "1 of .*'a'": lambda tokens: {("<x>" if token == "a" else token): number for token, number in tokens.items()},
}


@pytest.mark.parametrize("message", [*WRONG, "not a vocabulary"])
def test_files_that_are_wrong(message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = byte_level_vocabulary(tmp_path)
    if message in WRONG:
        files[0].write_text(json.dumps(WRONG[message](json.loads(files[0].read_text()))))
    else:
        files = files[1], files[0]
    with pytest.raises(DataError, match=f"--vocab-file {files[0]}.*{message}"):
        gpt2_tokenizer_folder(*files)
    assert not (tmp_path / "cache").exists()
