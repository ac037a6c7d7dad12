"""Test checks of data: which token ids are compared with the vocabulary, and which rank reads whole indices."""

import argparse
import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import HEADER, IndexedWriter, idx_path
from megatron.remoe.start.data import check_data, check_vocabulary


@pytest.mark.parametrize("place", [0, 2_200_000, 3_999_999])
def test_samples_come_from_all_over_the_data(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.full(4_000_000, 6, np.int32)
    ids[place] = 70_000
    with IndexedWriter(tmp_path / "large", np.dtype(np.int32)) as writer:
        writer.add(ids, np.array([len(ids)]))
        writer.finish()
        writer.publish()
    args = argparse.Namespace(mock_data=False, perform_rl_step=False, padded_vocab_size=384, split="100,0,0")
    args.tokenizer_type, args.data_path = "NullTokenizer", [str(tmp_path / "large")]
    monkeypatch.setattr(
        "megatron.remoe.start.data.get_blend_and_blend_per_split", lambda _: ((args.data_path, None), None)
    )
    with pytest.raises(DataError, match="has token 70000"):
        check_vocabulary(args)


def test_the_first_rank_alone_reads_whole_indices(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "text"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", f"{prefix}{suffix}")
    places = {"data_path": [str(prefix)], "data_cache_path": None, "split": "100,0,0", "seq_length": 64}
    args = argparse.Namespace(**places, mock_data=False, perform_rl_step=False, skip_train=False, eval_iters=0)
    index = bytearray(idx_path(prefix).read_bytes())
    index[HEADER.size + 4] ^= 1  # a length
    idx_path(prefix).write_bytes(index)
    monkeypatch.setattr(
        "megatron.remoe.start.data.get_blend_and_blend_per_split", lambda _: ((args.data_path, None), None)
    )
    for args.rank in (1, 0):
        with pytest.raises(DataError, match="corrupt") if args.rank == 0 else contextlib.nullcontext():
            check_data(args)
