"""Test the inspection of a data set, also of damaged files, and the cache folder of a user without a home."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.files import find_cache_folder
from megatron.remoe.files.indexed import HEADER, IndexedReader
from tools.text import inspect_data
from tools.text.corpora.dataset import byte_level_vocabulary

TEXTS = [b"first", b"", b"the second document", b"x" * 1000, b""]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a data set of bytes with Megatron, and return its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "bytes"
    # In GPT-2's order of bytes, "!" has id 0, and the space has id 220.
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


def test_documents_are_shown(whole, tmp_path, capsys) -> None:
    vocab_file, merge_file = byte_level_vocabulary(tmp_path)
    flags = ["--vocab-file", str(vocab_file), "--merge-file", str(merge_file)]
    assert inspect_data.main([str(whole), *flags]) == 0
    output = capsys.readouterr().out
    assert "5 documents (2 empty), 1,024 tokens" in output
    assert "mean 204.8, longest 1,000" in output
    assert "document 2 (19 tokens):\nthe second document\n" in output
    assert f"document 3 (1,000 tokens):\n{'x' * 300} …\n" in output
    assert inspect_data.main([f"{whole}.idx", "--documents", "1"]) == 0
    assert "\n69 72 81 82 83\n" in capsys.readouterr().out


@pytest.mark.parametrize("multimodal", [False, True])
def test_documents_of_several_sequences(multimodal, tmp_path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"), dtype=np.int32, multimodal=multimodal)
    builder.add_document([1, 2, 3, 4, 5], [2, 3], [0, 1] if multimodal else None)
    builder.add_document([6, 70_000], [1, 1], [0, 0] if multimodal else None)
    builder.finalize(str(tmp_path / "s.idx"))
    data = IndexedReader(tmp_path / "s")
    assert data.document_lengths().tolist() == [5, 2] and data.largest_token() == 70_000
    assert [data.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4, 5], [6, 70_000]]


def test_no_flipped_bit_of_the_index_changes_what_is_read(whole, copy) -> None:
    """Each flip is refused, unless it leaves document bounds in ascending order, which training does not read."""
    right, index = IndexedReader(whole), Path(f"{copy}.idx")
    head = index.read_bytes()
    refused = 0
    for bit in range(8 * len(head)):
        flipped = bytearray(head)
        flipped[bit // 8] ^= 1 << bit % 8
        index.write_bytes(flipped)
        try:
            data = IndexedReader(copy)
        except DataError:
            refused += 1
        else:
            assert bit // 8 >= HEADER.size + 12 * len(right.lengths)
            assert data.dtype == right.dtype and np.array_equal(data.lengths, right.lengths)
            assert np.array_equal(data.pointers, right.pointers)
    assert refused > 0.95 * 8 * len(head)


@pytest.mark.parametrize("how", ["no bin", "no idx", "short bin", "long bin", "short idx", "very short idx", "zeros"])
def test_damage_is_found(how, copy, capsys) -> None:
    path = Path(f"{copy}.{how[-3:]}" if how != "zeros" else f"{copy}.idx")
    data = path.read_bytes()
    changed = {"short": data[:-2], "long": data + b"\0\0", "very": data[:20], "zeros": bytes(len(data))}
    path.unlink()
    if not how.startswith("no"):
        path.write_bytes(changed[how.split()[0]])
    assert inspect_data.main([str(copy)]) == 1 and str(path) in capsys.readouterr().err


def test_a_wrong_vocabulary_is_found(copy, tmp_path, capsys) -> None:
    vocab_file, merge_file = byte_level_vocabulary(tmp_path)
    np.full(1024, 257, dtype=np.uint16).tofile(f"{copy}.bin")
    assert inspect_data.main([str(copy), "--vocab-file", str(vocab_file), "--merge-file", str(merge_file)]) == 1
    assert "token 257" in capsys.readouterr().err


def test_a_temporary_folder_of_others_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = find_cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert find_cache_folder() == folder
    folder.chmod(0o777)
    private = find_cache_folder()
    assert private != folder and private.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(private)
    assert find_cache_folder() not in (folder, private)
    assert os.listdir(private) == []
