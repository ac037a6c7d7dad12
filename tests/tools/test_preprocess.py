"""Test preprocessing: the same bytes as Megatron-LM's tool, one clear error for bad input, and no partial output."""

import asyncio
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.files.gpt2_files import read_gpt2_vocabulary
from tests.gpt2_reference import gpt2_files, random_text, same_files, write_reference
from tests.training_runs import REPOSITORY, wait_until
from tools import preprocess_data
from tools.text.corpora.dataset import byte_level_vocabulary
from tools.text.preprocessing import reading

TOOL = REPOSITORY / "tools" / "preprocess_data.py"
GPT2 = "--tokenizer-type GPT2BPETokenizer --vocab-file {} --merge-file {}".format(*gpt2_files())
GOOD = '{"text": "good"}'
STRANGE = [
    *("<|endoftext|>", "before<|endoftext|>after <|endoftext|>", "", " ", "\n\n\n   \t x", "nul \x00 \x1f bell"),
    *("naïve “quotes” — 漢字 한국어", "\U0001f469\u200d\U0001f467 \U0001f1ea\U0001f1fa", "it's IT'S we'll 12345 ½²"),
    *("young letters \ua7ce's \u088f's and numbers \U00010d40'll", "line\r\nends\rhere\u2028there\x85"),
    *("x" * 3000, "\ufeffmark", "mixed ascii then \U0001fae9 \U00033479"),
]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Return JSON lines with a title and a text each: real code, strange texts and random ones."""
    generator = random.Random(3)
    texts = [path.read_text() for path in sorted(Path(asyncio.__file__).parent.glob("*.py"))[:12]]
    texts += STRANGE + [random_text(generator) for _ in range(200)] + [""]
    texts = [texts[i] for i in generator.sample(range(len(texts)), len(texts))]
    records = ({"title": f"Nr. {i}", "text": text, "meta": {"a": [i]}} for i, text in enumerate(texts))
    return [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]


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


def write_lines(path: Path, lines: list[str], end: str = "\n") -> Path:
    """Write lines in the format of the file's name: plain, .gz or .zst, compressed in two parts."""
    data = ("\n".join(lines) + end).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data[:5000]) + gzip.compress(data[5000:])
    elif path.suffix == ".zst":
        skipped = b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab"
        data = skipped + reading.zstd.compress(data[:5000]) + reading.zstd.compress(data[5000:])
    path.write_bytes(data)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_same_bytes_as_megatron(lines, tmp_path, small_blocks, capsys, flags) -> None:
    source, keys = write_lines(tmp_path / "a.jsonl.zst", lines, end=""), ["text", "title"]
    write_reference(lines, tmp_path / "expected", keys, append_eod=True)
    extra = f"{GPT2} --append-eod --json-keys text title"
    assert preprocess_data.main(flags(tmp_path / "new" / "out", source, extra=extra)) == 0
    assert same_files(tmp_path / "new" / "out", tmp_path / "expected", keys)
    summary = capsys.readouterr().out
    assert summary.count("\n") == 1 and f"{len(lines)} documents" in summary and "with gigatoken" in summary
    assert not list((tmp_path / "new").glob(".tmp-*"))


def test_files_and_patterns(lines, tmp_path, flags, tokenizer) -> None:
    for i in range(3):
        write_lines(tmp_path / f"part{i}.jsonl{('', '.gz')[i % 2]}", lines[i::3], end=("\n", "")[i // 2])
    write_reference([line for i in range(3) for line in lines[i::3]], tmp_path / "expected", folder=str(tokenizer))
    command = flags(tmp_path / "out", tmp_path / "part0.jsonl", tmp_path / "part[12].jsonl*")
    assert preprocess_data.main(command) == 0
    assert same_files(tmp_path / "out", tmp_path / "expected")


def test_small_and_large_vocabularies(lines, tmp_path, flags) -> None:
    vocab_file, merge_file = byte_level_vocabulary(tmp_path)  # not byte_files: this file is changed below
    source = write_lines(tmp_path / "a.jsonl", lines)
    extra = f"--tokenizer-type GPT2BPETokenizer --vocab-file {vocab_file} --merge-file {merge_file} --append-eod"
    assert preprocess_data.main(flags(tmp_path / "out", source, extra=extra)) == 0
    tokens = json.loads(vocab_file.read_text())
    vocab_file.write_text(json.dumps(tokens | {f"<unused {i}>": i for i in range(len(tokens), 65500)}))
    assert preprocess_data.main(flags(tmp_path / "large", source, extra=extra)) == 0
    wide = np.fromfile(tmp_path / "large_text_document.bin", dtype=np.int32)
    assert np.array_equal(wide, np.fromfile(tmp_path / "out_text_document.bin", dtype=np.uint16))


def test_tokenizer_from_a_folder_that_adds_tokens_around_texts(lines, tmp_path, small_blocks, capsys, flags) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer, folder = read_gpt2_vocabulary(*gpt2_files()), tmp_path / "tokenizer"
    tokenizer.add_special_tokens(["<s>", "</s>"])
    around = {"single": "<s> $A </s> </s>", "special_tokens": [("<s>", 50257), ("</s>", 50258)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**around)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    source = write_lines(tmp_path / "a.jsonl", lines)
    extra = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder} --append-eod"
    assert preprocess_data.main(flags(tmp_path / "out", source, extra=extra)) == 0
    output = capsys.readouterr()
    assert "with gigatoken" in output.out and "warning: " not in output.err
    write_reference(lines, tmp_path / "expected", append_eod=True, folder=str(folder))
    assert same_files(tmp_path / "out", tmp_path / "expected")


# ---------------------------------------------------------------- input that cannot be used

BAD_LINES = {
    "not JSON": b'{"text": "x"',
    "blank": b"  ",
    "not an object": b'["text"]',
    "key missing": b'{"body": "x", "n": 1}',
    "not a string": b'{"text": null}',
    "half a character": b'{"text": "\\ud83d"}',
    "not UTF-8": b'{"text": "caf\xe9 x"}',
    "deep": b'{"text": ' + b"[" * 200_000,
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(kind, tmp_path, capsys, small_blocks, flags) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(f"{GOOD}\n".encode() * 700 + BAD_LINES[kind] + b"\n" + f"{GOOD}\n".encode() * 3)
    assert preprocess_data.main(flags(tmp_path / "out", source)) == 1
    error = capsys.readouterr().err
    assert f"error: {source}, line 701: " in error and len(error) < 600
    assert names(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_broken_compressed_data(how, suffix, lines, tmp_path, capsys, small_blocks, flags) -> None:
    source = write_lines(tmp_path / f"a.jsonl.{suffix}", lines)
    data = source.read_bytes()
    source.write_bytes(data[:-300] if how == "cut" else data[:-300] + bytes(300))
    assert preprocess_data.main(flags(tmp_path / "out", source)) == 1
    line = int(re.search(rf"{source}, after line (\d+): compressed data broken", capsys.readouterr().err)[1])
    assert 0 <= line <= len(lines) and names(tmp_path) == [source.name]


@pytest.mark.parametrize(("words", "named"), [
    ("{}/none.jsonl", "none.jsonl"),
    ("{}", "{}"),
    ("{}/empty.jsonl", "'text'"),
    ("/proc/self/mem", "/proc/self/mem"),
    ("{}/good.jsonl --tokenizer-type HuggingFaceTokenizer", "--tokenizer-model"),
    ("{}/good.jsonl --tokenizer-type HuggingFaceTokenizer --tokenizer-model {}/none", "--tokenizer-model {}/none"),
    ("{}/good.jsonl --tokenizer-type GPT2BPETokenizer --vocab-file x", "--merge-file"),
    ("{}/good.jsonl --tokenizer-type GPT2BPETokenizer --vocab-file x --merge-file y", "--vocab-file x"),
])  # fmt: skip
def test_wrong_inputs_and_flags_are_named(words, named, tmp_path, capsys, flags) -> None:
    write_lines(tmp_path / "good.jsonl", [GOOD])
    write_lines(tmp_path / "empty.jsonl", ['{"text": ""}'])
    source, _, extra = words.replace("{}", str(tmp_path)).partition(" ")
    assert preprocess_data.main(flags(tmp_path / "out", source, extra=extra)) == 1
    assert named.replace("{}", str(tmp_path)) in capsys.readouterr().err
    assert names(tmp_path) == ["empty.jsonl", "good.jsonl"]


# ---------------------------------------------------------------- outputs


def test_existing_outputs(tmp_path, capsys, flags, tokenizer) -> None:
    one, two = write_lines(tmp_path / "1.jsonl", [GOOD]), write_lines(tmp_path / "2.jsonl", [GOOD] * 2)
    write_reference([GOOD], tmp_path / "one", folder=str(tokenizer))
    write_reference([GOOD] * 2, tmp_path / "two", folder=str(tokenizer))
    output = tmp_path / "out"
    assert preprocess_data.main(flags(output, one)) == 0
    assert preprocess_data.main(flags(output, two)) == 1
    assert f"{output}_text_document.bin" in capsys.readouterr().err and same_files(output, tmp_path / "one")
    (tmp_path / "out_text_document.idx").unlink()  # as after a kill between the two files
    assert preprocess_data.main(flags(output, two)) == 0
    assert same_files(output, tmp_path / "two")


def test_full_disk(lines, tmp_path, flags) -> None:
    """A failing write is reported and leaves no files. A limit on file sizes simulates a full disk."""
    source = write_lines(tmp_path / "a.jsonl", lines * 2)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    command = [sys.executable, TOOL, *flags(tmp_path / "out", source)]
    result = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "REMOE-E105" in result.stderr
    assert names(tmp_path) == ["a.jsonl"]


def test_killed_or_interrupted_in_the_middle(lines, tmp_path, capsys, flags, tokenizer) -> None:
    aside, source = tmp_path / ".tmp-out_text_document.bin", write_lines(tmp_path / "a.jsonl", lines)
    large = write_lines(tmp_path / "large.jsonl", lines * 300)
    again = flags(tmp_path / "out", source, extra="--append-eod")

    def start() -> subprocess.Popen[bytes]:
        """Start a long run, and wait until it has written something."""
        process = subprocess.Popen([sys.executable, TOOL, *flags(tmp_path / "out", large)], stderr=subprocess.DEVNULL)
        wait_until(lambda: aside.exists() and aside.stat().st_size, process)
        return process

    process = start()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and names(tmp_path) == [source.name, large.name]

    process = start()
    assert preprocess_data.main(again) == 1
    assert "Another run is writing" in capsys.readouterr().err
    process.kill()
    process.wait()
    assert names(tmp_path) == [aside.name, source.name, large.name]
    assert preprocess_data.main(again) == 0
    write_reference(lines, tmp_path / "expected", append_eod=True, folder=str(tokenizer))
    assert same_files(tmp_path / "out", tmp_path / "expected")


def test_shards_of_the_pile(tmp_path, lines, byte_files) -> None:
    pile, output = tmp_path / "pile", tmp_path / "data sets"
    pile.mkdir()
    write_lines(pile / "00.jsonl.zst", lines)
    write_lines(pile / "01.jsonl", ['{"text": "fine"}', "broken"])
    vocab_file, merge_file = map(str, byte_files)
    environment = {"INPUT_DIR": str(pile), "OUTPUT_DIR": str(output), "SHARDS": "01\n00", "PYTHON": sys.executable}
    environment |= {"VOCAB_FILE": vocab_file, "MERGE_FILE": merge_file, "WORKERS": "1"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPOSITORY / "data_preprocessing.sh"), *arguments]
        return subprocess.run(command, env=os.environ | environment | more, capture_output=True, text=True)

    first = run()
    assert first.returncode == 1 and f"{pile}/01.jsonl, line 2: cannot be read" in first.stderr
    assert "2 shards, 1 failed" in first.stdout and f"  00  made: {len(lines)} documents" in first.stdout
    made = (output / "pile_00_text_document.bin").stat()
    write_lines(pile / "01.jsonl", ['{"text": "fine"}'])
    again = run()
    assert again.returncode == 0 and "  01  made: 1 documents" in again.stdout and "  00  was there: " in again.stdout
    assert (output / "pile_00_text_document.bin").stat().st_mtime_ns == made.st_mtime_ns
    os.truncate(output / "pile_00_text_document.bin", made.st_size - 2)
    damaged = run(SHARDS="00")
    assert damaged.returncode == 1 and "1 shards, 1 failed" in damaged.stdout
    run(VOCAB_FILE="", MERGE_FILE="", SHARDS="02", PIP_NO_INDEX="1")  # the installed package has the vocabulary
    assert (output / "vocab.bpe").read_bytes() == gpt2_files()[1].read_bytes()
    assert run(MERGE_FILE="").returncode == run(INPUT_DIR="nowhere").returncode == 2
