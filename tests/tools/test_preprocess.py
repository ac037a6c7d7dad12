"""Test preprocessing: the same bytes as Megatron-LM's tool for each form of input, and no partial output."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.files.gpt2_files import byte_level_vocabulary, read_gpt2_vocabulary
from megatron.remoe.files.indexed import IndexedReader
from tests.gpt2_reference import gpt2_files, same_files, write_reference
from tests.tools.jsonl import GOOD, GPT2, TOOL, write_lines
from tests.trainings import REPOSITORY
from tools import preprocess_data


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_same_bytes_as_megatron(name, lines, tmp_path, small_blocks, capsys, flags, monkeypatch) -> None:
    monkeypatch.setattr(preprocess_data, "SECONDS_TO_FIRST_LINE", 0.0)
    monkeypatch.setattr(preprocess_data, "SHARE_BETWEEN_LINES", 0.0)
    source = write_lines(tmp_path / name, lines, end="")
    keys = ["text", "title"]
    write_reference(lines, tmp_path / "expected", keys, append_eod=True)
    assert (
        preprocess_data.main(flags(tmp_path / "out", source, extra=f"{GPT2} --append-eod --json-keys text title")) == 0
    )
    assert same_files(tmp_path / "out", tmp_path / "expected", keys)
    summary, progress = capsys.readouterr()
    assert summary.count("\n") == 1 and f"{len(lines)} documents" in summary and "with gigatoken" in summary
    assert re.search(r"\d+%, [\d,]+ documents  [\d.]+ MB/s  [\d.]+M tokens/s  \d+:\d\d left\n", progress)
    assert not list(tmp_path.glob(".tmp-*"))


def test_files_globs_and_standard_input(lines, tmp_path, flags, byte_folder) -> None:
    for i in range(4):
        write_lines(tmp_path / f"part{i}.jsonl{('', '.gz')[i % 2]}", lines[i::4], end=("\n", "")[i // 2])
    write_reference([line for i in range(4) for line in lines[i::4]], tmp_path / "expected", folder=byte_folder)
    inputs = [tmp_path / "part0.jsonl", tmp_path / "part[12].jsonl*", "-"]
    with (tmp_path / "part3.jsonl.gz").open("rb") as piped:
        result = subprocess.run(
            [sys.executable, str(TOOL), *flags(tmp_path / "out", *inputs)], stdin=piped, capture_output=True, text=True
        )
    assert result.returncode == 0, result.stderr
    assert same_files(tmp_path / "out", tmp_path / "expected")


def test_the_end_of_documents_within_a_text_is_counted(tmp_path, capsys, flags) -> None:
    texts = ["before<|endoftext|>after", "none", "<|endoftext|><|endoftext|>"]
    source = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text}) for text in texts])
    assert preprocess_data.main(flags(tmp_path / "out", source, extra="--append-eod")) == 0
    assert "2 texts contain <|endoftext|>, which became token 256" in capsys.readouterr().out
    again = flags(tmp_path / "split", source, extra="--append-eod --split-special-tokens")
    assert preprocess_data.main(again) == 0
    assert "2 texts contain <|endoftext|>, which was encoded as text" in capsys.readouterr().out
    # Each <|endoftext|> becomes one token per byte; one more token follows each document.
    split = IndexedReader(tmp_path / "split_text_document")
    assert split.tokens == sum(len(text.encode()) + 1 for text in texts)
    assert preprocess_data.main(flags(tmp_path / "other", write_lines(tmp_path / "b.jsonl", [GOOD]))) == 0
    assert "endoftext" not in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from Linux")
@pytest.mark.parametrize("end", ["", "\u088f"], ids=["plain", "a character for the reference alone"])
def test_a_long_last_document_takes_little_memory(end, tmp_path, flags) -> None:
    """Memory stays below 600 MB; the reference, in one piece, takes 150 to 250 times the document (> 1,000 MB)."""
    text = (Path(random.__file__).read_text() * 200)[: 6 << 20] + end
    source = write_lines(tmp_path / "a.jsonl", [GOOD, json.dumps({"text": text})])
    # Not ru_maxrss: a child's starts at the size of its parent, which is large here.
    code = "import sys; from tools import preprocess_data as tool; code = tool.main(sys.argv[1:]); "
    code += "print(open('/proc/self/status').read()); sys.exit(code)"
    command = [sys.executable, "-c", code, *flags(tmp_path / "out", source, extra=GPT2)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1]) / 1e3 < 600


def test_small_and_large_vocabularies(lines, tmp_path, flags) -> None:
    vocab_file, merge_file = byte_level_vocabulary(tmp_path)  # not byte_files: this file is changed below
    source = write_lines(tmp_path / "a.jsonl", lines)
    extra = f"--tokenizer-type GPT2BPETokenizer --vocab-file {vocab_file} --merge-file {merge_file} --append-eod"
    assert preprocess_data.main(flags(tmp_path / "out", source, extra=extra)) == 0
    texts = [json.loads(line)["text"] for line in lines]
    expected = sum(len(text.replace("<|endoftext|>", "e").encode()) + bool(text) for text in texts)
    assert (tmp_path / "out_text_document.bin").stat().st_size == 2 * expected

    tokens = json.loads(vocab_file.read_text())
    vocab_file.write_text(json.dumps(tokens | {f"<unused {i}>": i for i in range(len(tokens), 65500)}))
    assert preprocess_data.main(flags(tmp_path / "large", source, extra=extra)) == 0
    assert (tmp_path / "large_text_document.bin").stat().st_size == 4 * expected
    wide = np.fromfile(tmp_path / "large_text_document.bin", dtype=np.int32)
    assert np.array_equal(wide, np.fromfile(tmp_path / "out_text_document.bin", dtype=np.uint16))


def save_tokenizer(kind: str, folder: Path) -> Path:
    """Save a tokenizer that adds tokens around each text ("template") or that gigatoken does not support ("words")."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind == "template":
        tokenizer = read_gpt2_vocabulary(*gpt2_files())
        tokenizer.add_special_tokens(["<s>", "</s>"])
        template = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s> </s>", special_tokens=[("<s>", 50257), ("</s>", 50258)]
        )
        tokenizer.post_processor = template
    else:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "the": 1, "</s>": 2}, "<unk>"))
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "engine"), [("template", "gigatoken"), ("words", "tokenizers")])
def test_tokenizers_from_folders(kind, engine, lines, tmp_path, small_blocks, capsys, flags) -> None:
    folder = save_tokenizer(kind, tmp_path / "tokenizer")
    source = write_lines(tmp_path / "a.jsonl", lines)
    extra = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder} --append-eod"
    assert preprocess_data.main(flags(tmp_path / "out", source, extra=extra)) == 0
    output = capsys.readouterr()
    assert f"with {engine}" in output.out
    assert output.err.count("warning: gigatoken cannot be used here") == (engine == "tokenizers")
    write_reference(lines, tmp_path / "expected", append_eod=True, folder=str(folder))
    assert same_files(tmp_path / "out", tmp_path / "expected")


def test_full_disk(lines, tmp_path, flags) -> None:
    """A failing write is reported and leaves no files. A limit on file sizes simulates a full disk."""
    source = write_lines(tmp_path / "a.jsonl", lines * 2)
    result = subprocess.run(
        [sys.executable, str(TOOL), *flags(tmp_path / "out", source)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "cannot be written (File too large). Nothing was left behind. Free some space" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_killed_in_the_middle(lines, tmp_path, capsys, flags, byte_folder) -> None:
    aside, output = tmp_path / ".tmp-out_text_document.bin", tmp_path / "out_text_document.bin"
    command = [sys.executable, str(TOOL), *flags(tmp_path / "out", "-", extra="--append-eod")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    while not (aside.exists() and aside.stat().st_size):
        assert process.poll() is None
        process.stdin.write("".join(f"{line}\n" for line in lines).encode())
    source = write_lines(tmp_path / "a.jsonl", lines)
    again = flags(tmp_path / "out", source, extra="--append-eod")
    assert preprocess_data.main(again) == 1
    assert "Another run is writing" in capsys.readouterr().err
    assert aside.exists()
    process.kill()
    process.communicate()
    assert not output.exists() and not output.with_suffix(".idx").exists()

    assert preprocess_data.main(again) == 0
    write_reference(lines, tmp_path / "expected", append_eod=True, folder=byte_folder)
    assert same_files(tmp_path / "out", tmp_path / "expected")
    assert not list(tmp_path.glob(".tmp-*"))


def test_interrupted(tmp_path, flags) -> None:
    command = [sys.executable, str(TOOL), *flags(tmp_path / "out", "-")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / ".tmp-out_text_document.bin").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    error = process.stderr.read()
    assert process.wait() == 130 and error.endswith("interrupted; nothing was written.\n")
    assert not list(tmp_path.iterdir())


def test_shards_of_the_pile(tmp_path, lines, byte_files) -> None:
    pile, output = tmp_path / "pile", tmp_path / "data sets"
    pile.mkdir()
    write_lines(pile / "00.jsonl.zst", lines)
    write_lines(pile / "01.jsonl", ['{"text": "fine"}', "broken"])
    vocab_file, merge_file = map(str, byte_files)
    environment = {"INPUT_DIR": str(pile), "OUTPUT_DIR": str(output), "SHARDS": "01 00", "PYTHON": sys.executable}
    environment |= {"VOCAB_FILE": vocab_file, "MERGE_FILE": merge_file, "WORKERS": "1"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPOSITORY / "data_preprocessing.sh"), *arguments]
        return subprocess.run(command, env=os.environ | environment | more, capture_output=True, text=True)

    first = run()
    assert first.returncode == 1 and f"{pile}/01.jsonl, line 2: not JSON" in first.stderr
    assert "2 shards, 1 failed" in first.stdout and "  01  failed" in first.stdout
    assert f"  00  made: {len(lines)} documents" in first.stdout
    made = (output / "pile_00_text_document.bin").stat()
    again = run("--on-error", "skip")
    assert again.returncode == 0 and "  01  made: 1 documents" in again.stdout and "  00  was there: " in again.stdout
    assert (output / "pile_00_text_document.bin").stat().st_mtime_ns == made.st_mtime_ns
    os.truncate(output / "pile_00_text_document.bin", made.st_size - 2)
    assert "  00  damaged: remove " in run(SHARDS="00").stdout
    assert run("--overwrite").returncode == run("--json-keys", "title").returncode == 2
    assert "give both of GPT-2's files, or neither" in run(MERGE_FILE="").stderr
    assert "INPUT_DIR 'nowhere': give the folder" in run(INPUT_DIR="nowhere").stderr
