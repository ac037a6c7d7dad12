"""Test GPT-2's vocabulary from two files, without network, in Megatron's own tokenizer."""

import json
import random
import socket
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


def broken(what: str, folder: Path) -> tuple[Path, Path]:
    vocab_file, merge_file = byte_level_vocabulary(folder)
    tokens = json.loads(vocab_file.read_text())
    if what == "swapped":
        vocab_file, merge_file = merge_file, vocab_file
    elif what == "no end of text":
        vocab_file.write_text(json.dumps({token: i for token, i in tokens.items() if token != "<|endoftext|>"}))
    elif what == "gap":
        vocab_file.write_text(json.dumps(tokens | {"<|endoftext|>": 300}))
    elif what == "no byte":
        vocab_file.write_text(json.dumps({("<x>" if token == "a" else token): i for token, i in tokens.items()}))
    return vocab_file, merge_file


@pytest.mark.parametrize(("what", "message"), [
    *(("swapped", "not a vocabulary"), ("gap", "ids"), ("no byte", "1 of .*'a'")),
    ("no end of text", r"<\|endoftext\|>.*256\)"),
])  # fmt: skip
def test_files_that_are_wrong(what, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = broken(what, tmp_path)
    message = f"--vocab-file {files[0]}.*{message}"
    with pytest.raises(DataError, match=message):
        gpt2_tokenizer_folder(*files)
    assert not (tmp_path / "cache").exists()
