"""Check the data sets of a training before it starts.

Every rank reads headers, sizes and small samples. What grows with the data, the indices, splits and Megatron's index
cache, is checked by the first rank only. Data in other formats is left to Megatron.
"""

import argparse
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedReader, idx_path
from megatron.remoe.start.index_cache import damaged_indices

TOKENS_SAMPLED, PLACES_SAMPLED = 2_000_000, 8
TOKENS_TO_JUDGE_BY = 10_000  # this many tokens of text have ids far above ...
SHARE_OF_VOCABULARY = 1 / 16  # ... this share of the vocabulary
SPLITS = ("training", "validation", "test")
PUT_WEIGHTS = "put one number before each prefix"
Blend = tuple[list[str], list[float] | None]
BlendReader = Callable[[argparse.Namespace], tuple[Blend | None, list[Blend | None] | None]]


def check_data(args: argparse.Namespace, read_blends: BlendReader) -> dict[Path, list[Path]]:
    """Check that the data sets exist, are complete, and leave no split empty.

    Megatron would loop forever over an empty split.

    Args:
        args: Megatron's arguments, validated.
        read_blends: Megatron's `get_blend_and_blend_per_split`.

    Returns:
        On the first rank, a file of Megatron's index cache that is cut off or of other data → all files of its index,
        for `remove_cached_indices`. On other ranks nothing.

    Raises:
        DataError: names flag, data set, reason and remedy.
    """
    damaged: dict[Path, list[Path]] = {}
    if args.mock_data or args.perform_rl_step:
        return damaged
    present = set()
    for flag, (prefixes, weights), split in _blends(args, read_blends):
        present |= {number for number, share in enumerate(split) if share is not None}
        if not all(0.0 < weight < math.inf for weight in weights or []):
            raise DataError(
                f"{flag}: has the weights {weights}. Give numbers above 0, and leave out unwanted data sets.",
                "REMOE-E303",
            )
        if any("://" in prefix for prefix in prefixes):
            continue
        data_sets = [_open(prefix, flag, thorough=args.rank == 0) for prefix in prefixes]
        if split[2] is not None and args.multiple_validation_sets:
            raise DataError(
                f"{flag}: with --multiple-validation-sets Megatron fails at a test set, after the training. Leave the "
                "flag out, or give 0 as the third number of --split.",
                "REMOE-E304",
            )
        for number, share in enumerate(split if args.rank == 0 else ()):
            if share is not None:
                _check_split(args, flag, data_sets, number, share, is_weighted=weights is not None)
        if args.rank == 0:
            damaged |= damaged_indices(args, dict(zip(prefixes, data_sets, strict=True)))
    for number, is_wanted, remedy in ((0, not args.skip_train, ""), (1, args.eval_iters, ", or --eval-iters 0")):
        if is_wanted and number not in present:
            flag = ("--train-data-path", "--valid-data-path")[number]
            given = f"--split {args.split}" if args.split else f"{flag} is missing"
            raise DataError(
                f"{given}: there is no {SPLITS[number]} data. Give {flag}, or another --split{remedy}.", "REMOE-E304"
            )
    return damaged


def check_vocabulary(args: argparse.Namespace, read_blends: BlendReader) -> None:
    """Check a sample of each data set's token ids against the model's vocabulary.

    Args:
        args: Megatron's arguments, after it has built the tokenizer.
        read_blends: Megatron's `get_blend_and_blend_per_split`.

    Raises:
        DataError: names data set, id, the vocabulary's size and the remedy.
    """
    size = args.padded_vocab_size
    if args.mock_data or args.perform_rl_step or not size:
        return
    given = _blends(args, read_blends)
    blends = [(flag, prefix) for flag, (prefixes, _), _ in given for prefix in prefixes if "://" not in prefix]
    for flag, prefix in blends:
        data = _open(prefix, flag)
        if not data.tokens or data.dtype.kind not in "iu":
            continue
        at_once = max(TOKENS_SAMPLED // (PLACES_SAMPLED * len(blends)), TOKENS_TO_JUDGE_BY)
        starts = np.linspace(0, max(data.tokens - at_once, 0), PLACES_SAMPLED, dtype=np.int64)
        ids = np.concatenate([data.read(start, at_once) for start in sorted({*starts.tolist()})])
        smallest, largest = int(ids.min()), int(ids.max())
        remedy = f"(--tokenizer-type {args.tokenizer_type}, padded). Give the tokenizer that the data was made with"
        if smallest < 0 or largest >= size:
            wrong = smallest if smallest < 0 else largest
            raise DataError(
                f"{flag} {prefix}: holds token {wrong}, and the vocabulary has {size} {remedy}.", "REMOE-E305"
            )
        few = data.tokens >= TOKENS_TO_JUDGE_BY and largest < SHARE_OF_VOCABULARY * size
        if few and "Null" not in args.tokenizer_type:
            raise DataError(
                f"{flag} {prefix}: the ids of {len(ids):,} tokens are all below {largest + 1}, and the vocabulary has "
                f"{size} {remedy}, or --tokenizer-type NullTokenizer --vocab-size to train on these ids as numbers.",
                "REMOE-E305",
            )


def _open(prefix: str, flag: str, thorough: bool = False) -> IndexedReader:
    path = Path(prefix)
    bare = path.with_suffix("")
    if path.suffix in (".bin", ".idx") and not idx_path(path).is_file() and idx_path(bare).is_file():
        raise DataError(f"{flag} {prefix}: give the prefix without suffix: {bare}", "REMOE-E301")
    try:
        return IndexedReader(path, thorough)
    except DataError as error:
        remedy = f" If it is a weight, {PUT_WEIGHTS}." if re.fullmatch(r"[\d.]+", prefix) else ""
        raise DataError(f"{flag} {prefix}: {error}{remedy}", error.code) from error
    except OSError as error:
        raise DataError(
            f"{flag} {prefix}: {error.filename}: cannot be read ({error.strerror}).", "REMOE-E301"
        ) from error


def _check_split(
    args: argparse.Namespace,
    flag: str,
    data_sets: list[IndexedReader],
    number: int,
    share: tuple[float, float],
    is_weighted: bool,
) -> None:
    """Check that every data set has tokens in a split, and that a single data set has a whole training sequence.

    Megatron uses data sets without weights for one epoch: each must have a sequence, and together they must suffice.
    """
    parts = [data.lengths[slice(*(round(end * len(data.lengths)) for end in share))] for data in data_sets]
    tokens = [int(part.sum(dtype=np.int64)) for part in parts]
    sequences = [max((some - 1) // args.seq_length, 0) for some in tokens]
    name, is_alone, length = SPLITS[number], len(data_sets) == 1, f"sequence of --seq-length {args.seq_length}"
    problem = ""
    if 0 in tokens:
        empty = data_sets[tokens.index(0)]
        split = f"--split {args.split}" if flag in ("--data-path", "--data-args-path") else flag
        problem = (
            f" {empty.prefix}: of its {len(empty.lengths):,} document(s) the {name} split gets nothing ({split}). Give "
            "more documents, or another --split; 0 turns a split off (training only: 100,0,0 with --eval-iters 0)."
        )
    elif is_alone and number == 0 and not sequences[0]:
        problem = (
            f" {data_sets[0].prefix}: has {tokens[0]:,} tokens for training, not even one {length} and the token after "
            "it. Give more data, or a shorter --seq-length."
        )
    elif not (is_alone or is_weighted) and 0 in sequences:
        problem = (
            f" {data_sets[sequences.index(0)].prefix}: has no whole {length} for {name}, and cannot be mixed in. Leave "
            "it out, or give another --split."
        )
    elif not (is_alone or is_weighted or args.dataloader_type == "cyclic"):
        wanted, there = _sequences_wanted(args)[number], sum(sequences)
        if wanted is not None and wanted > there:
            weighted = " ".join(f"{some} {data.prefix}" for some, data in zip(sequences, data_sets, strict=True))
            problem = (
                f": {wanted:,} sequences are wanted for {name}, and the {len(data_sets)} data sets have {there:,}. "
                "Without weights Megatron goes through them once and fails at their end. Put a weight before each; by "
                f"their sizes: {textwrap.shorten(weighted, 500, placeholder=' ...')}"
            )
    if problem:
        raise DataError(f"{flag}{problem}", "REMOE-E304")


def _sequences_wanted(args: argparse.Namespace) -> tuple[int | None, int | None, int | None]:
    """Return the sequences that Megatron asks of each split (`get_train_valid_test_num_samples`); None: any number."""
    once = args.eval_iters * args.eval_global_batch_size
    if args.skip_train:
        return None, None if args.full_validation else once, once
    training = args.train_samples or args.train_iters * args.global_batch_size
    iterations = args.train_iters or training // args.global_batch_size
    evaluations = iterations // args.eval_interval + 1 - (args.start_eval_at_iter or 0) // args.eval_interval
    return training, None if args.full_validation else max(evaluations, 0) * once, once


def _blends(
    args: argparse.Namespace, read_blends: BlendReader
) -> Iterator[tuple[str, Blend, list[tuple[float, float] | None]]]:
    """Yield flag, data sets and split matrix of each blend."""
    try:
        blend, per_split = read_blends(args)
    except OSError as error:
        raise DataError(
            f"The list of data sets {error.filename} cannot be read ({error.strerror}).", "REMOE-E301"
        ) from error
    except AssertionError as error:
        raise DataError(f"--data-path and the like: {PUT_WEIGHTS}.", "REMOE-E303") from error
    except (LookupError, TypeError, ValueError) as error:
        given = args.data_args_path or args.per_split_data_args_path or "--data-path"
        raise DataError(
            f"{given}: is no list of data sets ({error!r}). Give prefixes; in --per-split-data-args-path, JSON with "
            "train, valid and test.",
            "REMOE-E303",
        ) from error
    if blend is not None:
        yield "--data-path" if args.data_path else "--data-args-path", blend, _split_matrix(args.split)
    elif per_split is not None and any(per_split):
        for number, (name, one) in enumerate(zip(("train", "valid", "test"), per_split, strict=True)):
            if one is not None:
                flag = f"--{name}-data-path" if args.per_split_data_args_path is None else "--per-split-data-args-path"
                yield flag, one, [(0.0, 1.0) if i == number else None for i in range(len(SPLITS))]
    else:
        raise DataError(
            "--data-path is missing: give the prefix of a .bin/.idx pair, without suffix (tools/preprocess_data.py "
            "makes one), or --mock-data to try things out.",
            "REMOE-E301",
        )


def _split_matrix(split: str | None) -> list[tuple[float, float] | None]:
    words = [word.strip() for word in (split or "").split(",")]
    numbers = [float(word) for word in words if re.fullmatch(r"\d+\.?\d*|\.\d+", word)]
    if len(numbers) == len(words) <= len(SPLITS) and any(numbers):
        return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    raise DataError(
        f"--split {split}: give up to three numbers, for training, validation and test, for instance 969,30,1.",
        "REMOE-E304",
    )
