"""Test checks of data: which token ids are compared with the vocabulary, and which rank reads whole indices."""

import argparse
import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import HEADER, idx_path
from megatron.remoe.start.data import check_data, check_vocabulary
from tests.data_sets import write_tokens
from tools.recipes.megatron_values import make_parser


def parse_data_flags(prefix: Path) -> argparse.Namespace:
    """Return Megatron's arguments for training on a data set without validation."""
    words = f"--data-path {prefix} --split 100,0,0 --seq-length 64 --eval-iters 0 --tokenizer-type NullTokenizer"
    return make_parser().parse_args(words.split())


@pytest.mark.parametrize(("place", "token"), [(0, 70_000), (2_200_000, -7), (3_999_999, 70_000)])
def test_samples_come_from_all_over_the_data(place: int, token: int, tmp_path: Path) -> None:
    ids = np.full(4_000_000, 6, np.int32)
    ids[place] = token
    write_tokens(tmp_path / "large", ids, [len(ids)])
    args = parse_data_flags(tmp_path / "large")
    args.padded_vocab_size = 384
    with pytest.raises(DataError, match=f"has token {token}"):
        check_vocabulary(args)


def test_the_first_rank_alone_reads_whole_indices(data: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "text"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data}{suffix}", f"{prefix}{suffix}")
    args = parse_data_flags(prefix)
    index = bytearray(idx_path(prefix).read_bytes())
    index[HEADER.size + 4] ^= 1  # a length
    idx_path(prefix).write_bytes(index)
    for args.rank in (1, 0):
        with pytest.raises(DataError, match="corrupt") if args.rank == 0 else contextlib.nullcontext():
            check_data(args)
