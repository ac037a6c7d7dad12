"""Inspection: what it shows of a data set, and every way in which a pair can be damaged."""

import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.gpt2_files import byte_level_vocabulary
from megatron.remoe.data.indexed import HEADER, IndexedReader
from tools import inspect_data

TEXTS = [b"first", b"", b"the second document", b"x" * 1000, b""]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of bytes, written by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "bytes"
    # In GPT-2's vocabularies "!" has the id 0.
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for text in TEXTS:
        builder.add_document([byte - ord("!") if byte > 32 else 220 for byte in text], [len(text)] if text else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{whole}.{suffix}", tmp_path / f"copy.{suffix}")
    return tmp_path / "copy"


def test_what_is_shown(whole, tmp_path, capsys) -> None:
    vocab_file, merge_file = byte_level_vocabulary(tmp_path)
    flags = ["--vocab-file", str(vocab_file), "--merge-file", str(merge_file), "--characters", "30"]
    assert inspect_data.main([str(whole), *flags]) == 0
    output = capsys.readouterr().out
    assert "5 documents (2 empty), 1,024 tokens" in output
    assert "mean 204.8, median 5, 90 % up to 608, longest 1,000" in output
    counts = {match[1]: int(match[2]) for match in re.finditer(r"^ +(\S+) +(\d+)(?: █+)?$", output, re.MULTILINE)}
    assert counts == {"0": 2, "1": 0, "2-3": 0, "4-7": 1, "8-15": 0, "16-31": 1, "32-63": 0, "64-127": 0,
                      "128-255": 0, "256-511": 0, "512-1,023": 1}  # fmt: skip
    assert "document 0 (5 tokens):\nfirst\n" in output
    assert "document 2 (19 tokens):\nthe second document\n" in output
    assert f"document 3 (1,000 tokens):\n{'x' * 30} …\n" in output

    assert inspect_data.main([f"{whole}.idx", "--documents", "1"]) == 0
    assert "69 72 81 82 83  (no vocabulary given" in capsys.readouterr().out


def test_all_empty(tmp_path, capsys) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "e.bin"), dtype=np.int32)
    builder.add_document([], [])
    builder.finalize(str(tmp_path / "e.idx"))
    assert inspect_data.main([str(tmp_path / "e")]) == 0
    assert "1 documents (1 empty), 0 tokens" in capsys.readouterr().out


def test_documents_of_several_sequences(tmp_path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([6, 70_000], [1, 1])
    builder.finalize(str(tmp_path / "s.idx"))
    data = IndexedReader(tmp_path / "s")
    assert data.document_lengths().tolist() == [5, 2] and data.largest_token() == 70_000
    assert [data.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4, 5], [6, 70_000]]


def damage(prefix: Path, how: str) -> None:
    tokens, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    head = bytearray(index.read_bytes())
    sequences = 3
    pointers = HEADER.size + 4 * sequences
    bounds = pointers + 8 * sequences
    match how:
        case "no bin":
            tokens.unlink()
        case "short bin":
            tokens.write_bytes(tokens.read_bytes()[:-2])
        case "long bin":
            tokens.write_bytes(tokens.read_bytes() + b"\0\0")
        case "short idx":
            index.write_bytes(head[:-8])
        case "very short idx":
            index.write_bytes(head[:20])
        case "zeros":
            index.write_bytes(bytes(len(head)))
        case "version":
            head[9] = 2
        case "type":
            head[17] = 99
        case "negative length":
            struct.pack_into("<i", head, HEADER.size + 4, -1)
        case "other length":
            struct.pack_into("<i", head, HEADER.size, 6)
        case "pointer outside":
            struct.pack_into("<q", head, pointers + 8, 1 << 40)
        case "bounds":
            struct.pack_into("<q", head, bounds + 8, 3)
        case "last bound":
            struct.pack_into("<q", head, bounds + 8 * len(TEXTS), 2)
    if how in ("version", "type", "negative length", "other length", "pointer outside", "bounds", "last bound"):
        index.write_bytes(head)


@pytest.mark.parametrize(("how", "message"), [
    ("no bin", r"there is no .*/copy\.bin\. Give the prefix"),
    ("short bin", r"copy\.bin is truncated or corrupt: it has 2,046 bytes instead of 2,048"),
    ("long bin", r"copy\.bin is truncated or corrupt: it has 2,050 bytes instead of 2,048"),
    ("short idx", r"copy\.idx is truncated or corrupt: it has 110 bytes instead of 118"),
    ("very short idx", r"copy\.idx is truncated or corrupt: 20 bytes, fewer than the 34 of a header"),
    ("zeros", r"copy\.idx is truncated or corrupt: it does not begin with the header"),
    ("version", r"copy\.idx is truncated or corrupt: it does not begin with the header"),
    ("type", r"copy\.idx is truncated or corrupt: unknown code 99"),
    ("negative length", r"copy\.idx is truncated or corrupt: sequence 1 has a negative length"),
    ("other length", r"copy\.idx is truncated or corrupt: sequence 1 starts at byte 10 of the \.bin file, not where"),
    ("pointer outside", r"copy\.idx is truncated or corrupt: sequence 1 starts at byte 1099511627776 of the \.bin"),
    ("bounds", r"copy\.idx is truncated or corrupt: its document bounds are not in order"),
    ("last bound", r"copy\.idx is truncated or corrupt: its document bounds do not span its sequences"),
])  # fmt: skip
def test_damage_is_found(how, message, copy, capsys) -> None:
    IndexedReader(copy)
    damage(copy, how)
    with pytest.raises(DataError, match=message):
        IndexedReader(copy)
    assert inspect_data.main([str(copy)]) == 1
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_other_vocabulary(copy, tmp_path, capsys) -> None:
    vocab_file, merge_file = byte_level_vocabulary(tmp_path)
    np.full(1024, 257, dtype=np.uint16).tofile(f"{copy}.bin")
    assert inspect_data.main([str(copy), "--vocab-file", str(vocab_file), "--merge-file", str(merge_file)]) == 1
    assert "copy.bin: holds token 257, and the vocabulary has only 257" in capsys.readouterr().err
