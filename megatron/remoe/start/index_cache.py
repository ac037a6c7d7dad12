"""Find files of Megatron's index cache that are cut off or of other data, and remove them."""

import argparse
import json
import os
import re
import sys
import time
import tokenize
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedReader

SEQUENCES_SAMPLED = 100
SECONDS_OF_WRITING = 2


def damaged_indices(args: argparse.Namespace, data_sets: Mapping[str, IndexedReader]) -> dict[Path, list[Path]]:
    """Find damaged indices in the cache.

    Args:
        args: Megatron's arguments, validated.
        data_sets: their prefixes, as given → the data sets.

    Returns:
        A file that a full disk cut off, or that is of other data → all files of its index.

    Raises:
        DataError: such an index cannot be built again.
    """
    found = {}
    for folder in [args.data_cache_path] if args.data_cache_path else [f"{path}/cache" for path in data_sets]:
        for description in Path(folder).rglob("*-description.txt"):
            text = description.read_text(errors="replace")
            sources = {json.loads(path) for path in re.findall(r'"dataset_path": (".*")', text)}
            own = sources & data_sets.keys()
            if sources and not own:
                continue  # another training's index
            arrays = [*description.parent.glob(f"{description.name.removesuffix('description.txt')}*.npy")]
            unusable = [path for path in arrays if _is_cut(path)]
            if not unusable and own and "-GPTDataset-" in description.name:
                unusable = arrays if _is_of_other_data(text, arrays, data_sets[own.pop()]) else []
            if not unusable:
                continue
            if args.dataloader_fast_cache_load or not os.access(description.parent, os.W_OK):
                raise DataError(
                    f"{unusable[0]}: is cut off or of other data. Start once without --dataloader-fast-cache-load and "
                    "with a --data-cache-path that can be written: Megatron rebuilds its index cache.",
                    "REMOE-E306",
                )
            found[unusable[0]] = arrays
    return found


def _is_of_other_data(description: str, arrays: list[Path], data: IndexedReader) -> bool:
    """Return whether an index of GPTDataset does not fit the data: by its sizes, or by the length of some sequences.

    The time of the files says nothing: a job can copy the same data to its node.
    """
    found = {path.stem.rpartition("-")[2]: np.lib.format.open_memmap(path, mode="r") for path in arrays}
    if not {"document_index", "sample_index"} <= found.keys():
        return False  # Megatron builds it
    try:
        of, documents, samples = json.loads(description), found["document_index"], found["sample_index"]
        matrix, number = of["split_matrix"], ("train", "valid", "test").index(of["index_split"])
        share = matrix[number] if matrix else (0.0, 1.0)
        first, last = (round(end * len(data.lengths)) for end in share)
        epochs, rest = divmod(len(documents), last - first)
        whole = (epochs * int(data.lengths[first:last].sum(dtype=np.int64)) - 1) // of["sequence_length"]
        if rest or len(samples) - 1 not in (whole, whole + 1):  # a set for validation can keep a shorter last one
            return True
        for number in range(0, len(samples) - 2, len(samples) // SEQUENCES_SAMPLED + 1):
            (start, offset), (end, to) = samples[number : number + 2].tolist()
            lengths = data.lengths.take(documents[start:end], mode="clip")
            if int(lengths.sum(dtype=np.int64)) + to - offset != of["sequence_length"]:
                return True
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return True  # damaged
    return False


def _is_cut(path: Path) -> bool:
    """Return whether an array's file is shorter than its header says and no longer grows (another run may write it)."""
    size = -1
    while True:
        try:
            np.lib.format.open_memmap(path, mode="r")
            return False
        except (ValueError, tokenize.TokenError):  # NumPy reads a header as Python's
            before, size = size, path.stat().st_size
            if size == before:
                return True
            time.sleep(SECONDS_OF_WRITING)


def remove_cached_indices(damaged: Mapping[Path, list[Path]]) -> None:
    """Remove the indices that `check_data` found damaged; Megatron builds them again.

    Raises:
        OSError: a file cannot be removed.
    """
    for file, index in damaged.items():
        print(f"{file}: is cut off or of other data; Megatron rebuilds its index.", file=sys.stderr)
        for path in index:
            path.unlink(missing_ok=True)
