"""Test unusable lines, files and flags: each gives one clear error, and nothing is written."""

import re
from pathlib import Path

import pytest

from tests.gpt2_reference import same_files, write_reference
from tests.tools.jsonl import GOOD, write_lines
from tools import preprocess_data
from tools.text.preprocessing import documents, reading

BAD_LINES = {
    "not JSON": (b'{"text": "x"', r"not JSON \(Expecting ',' delimiter.*'\{\"text\": \"x\"'"),
    "blank line": (b"  ", r"blank line: '  '"),
    "not a JSON object": (b'["text"]', r"not a JSON object: '\[\"text\"\]'"),
    "key missing": (b'{"body": "x", "n": 1}', r"key missing: no 'text' among 'body', 'n'"),
    "text not a string": (b'{"text": null}', r"text not a string: 'text'"),
    "text not Unicode": (b'{"text": "\\ud83d"}', r"text not Unicode: 'text' has half a character \(\\ud83d\)"),
    "not UTF-8": (b'{"text": "caf\xe9 x"}', r"not UTF-8 \(byte 14\): .*caf\\\\xe9 x"),
    "nested": (b'{"text": ' + b"[" * 200_000, r"not JSON \("),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(kind, tmp_path, capsys, small_blocks, flags, byte_folder) -> None:
    line, message = BAD_LINES[kind]
    source = tmp_path / "a.jsonl"
    source.write_bytes(f"{GOOD}\n".encode() * 700 + line + b"\n" + f"{GOOD}\n".encode() * 3)
    assert preprocess_data.main(flags(tmp_path / "out", source)) == 1
    error = capsys.readouterr().err
    assert f"error: {source}, line 701: " in error and "--on-error skip" in error and len(error) < 600
    assert re.search(message, error)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    assert preprocess_data.main(flags(tmp_path / "out", source, extra="--on-error skip")) == 0
    output = capsys.readouterr()
    assert "703 documents" in output.out and "left out 1 lines (1 " in output.out
    assert f"left out: {source}, line 701: " in output.err
    write_reference([GOOD] * 703, tmp_path / "expected", folder=byte_folder)
    assert same_files(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("how", ["cut", "changed"])
def test_broken_compressed_data(how, suffix, lines, tmp_path, capsys, small_blocks, flags) -> None:
    source = write_lines(tmp_path / f"a.jsonl.{suffix}", lines)
    data = source.read_bytes()
    source.write_bytes(data[:-300] if how == "cut" else data[:-300] + bytes(300))
    assert preprocess_data.main(flags(tmp_path / "out", source, extra="--on-error skip")) == 1
    line = int(re.search(rf"{source}, after line (\d+): compressed data broken", capsys.readouterr().err)[1])
    assert 1 < line <= len(lines)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize(("name", "data", "message"), [
    ("a.jsonl.gz", b"plain", "is not gzip data, as its name says"),
    ("a.jsonl.zst", b"plain", "is not zstd data, as its name says"),
    ("a.jsonl", b"", "nothing to write: no text of key 'text' has a token"),
    ("a.jsonl", b'{"text": ""}\n', "nothing to write: no text of key 'text' has a token"),
    ("a.jsonl", None, "there is no such file, and as a pattern it matches none"),
    ("a.jsonl", "folder", "is a folder. Name its files, for example with"),
])  # fmt: skip
def test_inputs_that_cannot_be_used(name, data, message, tmp_path, capsys, flags) -> None:
    source = tmp_path / name
    if data == "folder":
        source.mkdir()
    elif data is not None:
        source.write_bytes(data)
    assert preprocess_data.main(flags(tmp_path / "out", source)) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_byte_order_mark_and_empty_texts(tmp_path, capsys, flags) -> None:
    """Windows programs begin a file with U+FEFF. A document counts once, however many keys are empty."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(
        "\ufeff".encode() + b'{"text": "a", "title": ""}\n{"text": "", "title": ""}\n{"text": "", "title": "b"}\n'
    )
    assert preprocess_data.main(flags(tmp_path / "out", source, extra="--json-keys text title")) == 0
    assert "3 documents (2 empty)" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that exists and cannot be read")
def test_unreadable_file(tmp_path, capsys, flags) -> None:
    assert preprocess_data.main(flags(tmp_path / "out", "/proc/self/mem")) == 1
    assert "--input /proc/self/mem: cannot be read (Input/output error)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_line_of_absurd_length(tmp_path, capsys, monkeypatch, small_blocks, flags) -> None:
    for module in (documents, reading):
        monkeypatch.setattr(module, "LONGEST_LINE", 1 << 20)
    source = write_lines(tmp_path / "a.jsonl.gz", [GOOD] * 5 + ["x" * (3 << 20), GOOD, "x" * (1 << 20)])
    assert preprocess_data.main(flags(tmp_path / "out", source)) == 1
    error = capsys.readouterr().err
    assert f"{source}, line 6: longer than 1 MiB" in error and "--on-error skip" in error and len(error) < 600
    assert preprocess_data.main(flags(tmp_path / "out", source, extra="--on-error skip")) == 0
    output = capsys.readouterr()
    assert "6 documents" in output.out and "left out 2 lines (2 longer than 1 MiB)" in output.out
    assert f"left out: {source}, line 8: " in output.err


@pytest.mark.parametrize(("extra", "message"), [
    ("--json-keys text text", "--json-keys text text: a key is given twice"),
    ("--tokenizer-type HuggingFaceTokenizer", "needs --tokenizer-model"),
    ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model {}/none", "transformers cannot load a fast tokenizer"),
    ("--tokenizer-type HuggingFaceTokenizer --tokenizer-model {} --vocab-file x", "neither --vocab-file nor"),
    ("--tokenizer-type GPT2BPETokenizer --vocab-file x", "needs --vocab-file and --merge-file"),
    ("--tokenizer-type GPT2BPETokenizer --vocab-file x --merge-file y", "--vocab-file x: there is no such file"),
])  # fmt: skip
def test_flags_that_are_wrong(extra, message, tmp_path, capsys, flags) -> None:
    source = write_lines(tmp_path / "a.jsonl", [GOOD])
    assert preprocess_data.main(flags(tmp_path / "out", source, extra=extra.format(tmp_path))) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_existing_outputs(tmp_path, capsys, flags, byte_folder) -> None:
    one, two = write_lines(tmp_path / "1.jsonl", [GOOD]), write_lines(tmp_path / "2.jsonl", [GOOD] * 2)
    assert preprocess_data.main(flags(tmp_path / "out", one)) == 0
    assert preprocess_data.main(flags(tmp_path / "out", two)) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/out_text_document.bin" in error and "--overwrite" in error
    assert preprocess_data.main(flags(tmp_path / "none" / "out", one)) == 1
    assert f"there is no folder {tmp_path}/none" in capsys.readouterr().err
    write_reference([GOOD], tmp_path / "expected", folder=byte_folder)
    assert same_files(tmp_path / "out", tmp_path / "expected")
    bad = write_lines(tmp_path / "bad.jsonl", ["{"])
    assert preprocess_data.main(flags(tmp_path / "out", bad, extra="--overwrite")) == 1
    assert same_files(tmp_path / "out", tmp_path / "expected")
    cache = tmp_path / "out_text_document" / "cache" / "GPTDataset_indices"  # Megatron's cache of the first data
    cache.mkdir(parents=True)
    (cache / "hash-description.txt").write_text("{}")
    assert preprocess_data.main(flags(tmp_path / "out", two, extra="--overwrite")) == 0
    assert not cache.exists()
    (tmp_path / "out_text_document.idx").unlink()  # as after a kill between the two files
    assert preprocess_data.main(flags(tmp_path / "out", two)) == 0
    write_reference([GOOD] * 2, tmp_path / "expected", folder=byte_folder)
    assert same_files(tmp_path / "out", tmp_path / "expected")
