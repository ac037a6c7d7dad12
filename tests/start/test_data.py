"""Test data that do not fit the vocabulary, and Megatron's index cache after a full disk or with other data."""

import argparse
import contextlib
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import HEADER, IndexedReader, IndexedWriter, idx_path
from megatron.remoe.start.data import check_data, check_vocabulary
from megatron.remoe.start.environment import make_output_folders
from megatron.remoe.start.index_cache import damaged_indices
from tests.trainings import TINY, run, series

CACHED = "cache/GPTDataset_indices/*-train-shuffle_index.npy"


@pytest.fixture
def prefix(data: Path, tmp_path: Path) -> Path:
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", tmp_path / f"text{suffix}")
    return tmp_path / "text"


def losses(prefix: Path, *more: str) -> tuple[list[float], str]:
    output = run([*TINY, "--train-iters", "2", "--data-path", str(prefix), *more])
    return series(output, "lm loss"), output


@pytest.mark.parametrize("damage", ["half", "empty"])
def test_unusable_index_is_named_and_built_again(damage: str, prefix: Path) -> None:
    first, output = losses(prefix)
    (cached,) = prefix.glob(CACHED)
    whole = cached.read_bytes()
    assert cached.name not in output
    os.truncate(cached, len(whole) // 2 if damage == "half" else 0)
    again, output = losses(prefix)
    assert again == first and str(cached) in output
    assert cached.read_bytes() == whole


def test_an_index_is_kept_as_long_as_it_fits_the_data(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is kept for newer files with the same data, and not for more documents or another order."""
    losses(prefix, "--eval-iters", "1")
    args = argparse.Namespace(data_cache_path=None, dataloader_fast_cache_load=False)
    os.utime(idx_path(prefix))
    data = IndexedReader(prefix)
    assert damaged_indices(args, {str(prefix): data}) == {}
    (cached,) = prefix.glob(CACHED)
    content = cached.read_bytes()
    cached.write_bytes(content.replace(b"'shape'", b"'sh\0pe'"))
    assert [*damaged_indices(args, {str(prefix): data})] == [cached]
    cached.write_bytes(content)
    texts = [data.document(number) for number in range(data.documents)]
    for number, other in enumerate(([*texts, texts[0]], texts[::-1])):
        with IndexedWriter(prefix.with_name(f"other{number}"), data.dtype) as writer:
            writer.add(np.concatenate(other), np.array([len(text) for text in other]))
            writer.finish()
            writer.publish()
        found = damaged_indices(args, {str(prefix): IndexedReader(writer.prefix)})
        assert len(found) == 2 and {len(index) for index in found.values()} == {3}, "training and validation"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataError, match="--data-cache-path"):
        damaged_indices(args, {str(prefix): IndexedReader(writer.prefix)})


def test_cache_of_another_training_is_left_alone(prefix: Path, tmp_path: Path) -> None:
    losses(prefix, "--data-cache-path", str(tmp_path / "cache"))
    (cached,) = (tmp_path / "cache").glob("*-train-shuffle_index.npy")
    os.truncate(cached, 0)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"other{suffix}")
    found, _ = losses(tmp_path / "other", "--data-cache-path", str(tmp_path / "cache"))
    assert all(map(math.isfinite, found)) and cached.stat().st_size == 0


def test_loading_unchecked_is_refused(prefix: Path, tmp_path: Path) -> None:
    """With --dataloader-fast-cache-load, Megatron would not build the damaged index again."""
    cache = ["--data-cache-path", str(tmp_path / "cache")]
    losses(prefix, *cache)
    (cached,) = (tmp_path / "cache").glob("*-train-shuffle_index.npy")
    os.truncate(cached, 100)
    arguments = [*TINY, "--data-path", str(prefix), *cache, "--dataloader-fast-cache-load"]
    output = run(arguments, expect=2)
    assert str(cached) in output and "Traceback" not in output and cached.exists()


@pytest.mark.parametrize("place", [0, 2_200_000, 3_999_999])
def test_samples_come_from_all_over_the_data(place: int, tmp_path: Path) -> None:
    ids = np.full(4_000_000, 6, np.int32)
    ids[place] = 70_000
    with IndexedWriter(tmp_path / "large", np.dtype(np.int32)) as writer:
        writer.add(ids, np.array([len(ids)]))
        writer.finish()
        writer.publish()
    args = argparse.Namespace(mock_data=False, perform_rl_step=False, padded_vocab_size=384, split="100,0,0")
    args.tokenizer_type, args.data_path = "NullTokenizer", [str(tmp_path / "large")]
    with pytest.raises(DataError, match="holds token 70000"):
        check_vocabulary(args, lambda args: ((args.data_path, None), None))


def test_an_existing_cache_need_not_be_writable() -> None:
    """The cache can be a read-only folder such as /proc, where not even root can make a file."""
    places = {"save": None, "tensorboard_dir": None, "data_cache_path": None}
    make_output_folders(argparse.Namespace(**places | {"data_cache_path": "/proc"}))
    with pytest.raises(DataError, match="--save /proc"):
        make_output_folders(argparse.Namespace(**places | {"save": "/proc"}))


def test_the_first_rank_alone_reads_whole_indices(prefix: Path) -> None:
    places = {"data_path": [str(prefix)], "data_cache_path": None, "split": "100,0,0", "seq_length": 64}
    off = dict.fromkeys(("mock_data", "perform_rl_step", "multiple_validation_sets", "skip_train", "eval_iters"), False)
    args = argparse.Namespace(**places, **off, local_rank=0)
    index = bytearray(idx_path(prefix).read_bytes())
    index[HEADER.size + 4] ^= 1  # a length
    idx_path(prefix).write_bytes(index)
    for args.rank in (1, 0):
        with pytest.raises(DataError, match="corrupt") if args.rank == 0 else contextlib.nullcontext():
            assert check_data(args, lambda _: (([str(prefix)], None), None)) == {}
