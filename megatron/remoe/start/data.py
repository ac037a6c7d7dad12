"""Check the data sets of a run before it starts.

Every rank reads headers, sizes and small samples. The first rank also checks indices and splits, which grow with the
data. Data in other formats is left to Megatron.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedReader
from megatron.training.utils import get_blend_and_blend_per_split

TOKENS_SAMPLED, PLACES_SAMPLED = 2_000_000, 8
SPLITS = ("training", "validation", "test")
Blend = tuple[list[str], list[float] | None]


def check_data(args: argparse.Namespace) -> None:
    """Check that the data sets exist, are complete, and leave no split empty.

    Megatron would loop forever over an empty split.

    Args:
        args: Megatron's arguments, validated.

    Raises:
        DataError: a data set is missing or damaged, or a needed split is empty; the message names flag and remedy.
    """
    if args.mock_data or args.perform_rl_step:
        return
    present = set()
    for flag, (prefixes, weights), split in _blends(args):
        present |= {number for number, share in enumerate(split) if share is not None}
        if any("://" in prefix for prefix in prefixes):
            continue
        data_sets = [_open(prefix, flag, thorough=args.rank == 0) for prefix in prefixes]
        for number, share in enumerate(split if args.rank == 0 else ()):
            if share is not None:
                tokens = _check_split(args, flag, data_sets, number, share)
                if weights is None and args.dataloader_type == "single":
                    _check_blend(args, flag, tokens, number)
    if 2 in present and args.multiple_validation_sets and args.eval_iters:
        raise DataError(
            "--multiple-validation-sets: Megatron fails at the test data, after the last step. Leave --test-data-path "
            "out, or give 0 as the third number of --split.",
            "REMOE-E304",
        )
    for number, is_wanted, remedy in ((0, not args.skip_train, ""), (1, args.eval_iters, ", or --eval-iters 0")):
        if is_wanted and number not in present:
            flag = ("--train-data-path", "--valid-data-path")[number]
            given = f"--split {args.split}" if args.split else f"{flag} is missing"
            raise DataError(
                f"{given}: there is no {SPLITS[number]} data. Give {flag}, or a different --split{remedy}.",
                "REMOE-E304",
            )


def check_vocabulary(args: argparse.Namespace) -> None:
    """Check a sample of each data set's token ids against the model's vocabulary.

    Args:
        args: Megatron's arguments, after it has built the tokenizer.

    Raises:
        DataError: an id is outside the vocabulary; the message names data set, id, the vocabulary's size and remedy.
    """
    size = args.padded_vocab_size
    if args.mock_data or args.perform_rl_step or not size:
        return
    blends = [(flag, prefix) for flag, (prefixes, _), _ in _blends(args) for prefix in prefixes if "://" not in prefix]
    for flag, prefix in blends:
        data = _open(prefix, flag)
        if not data.tokens or data.dtype.kind not in "iu":
            continue
        at_once = max(TOKENS_SAMPLED // (PLACES_SAMPLED * len(blends)), 1)
        starts = np.linspace(0, max(data.tokens - at_once, 0), PLACES_SAMPLED, dtype=np.int64)
        ids = np.concatenate([data.read(start, at_once) for start in sorted({*starts.tolist()})])
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= size:
            raise DataError(
                f"{flag} {prefix}: has token {smallest if smallest < 0 else largest}, but the vocabulary has {size} "
                f"(--tokenizer-type {args.tokenizer_type}, padded). Give the tokenizer that the data was made with.",
                "REMOE-E305",
            )


def _open(prefix: str, flag: str, thorough: bool = False) -> IndexedReader:
    try:
        return IndexedReader(Path(prefix), thorough)
    except DataError as error:
        raise DataError(f"{flag} {prefix}: {error}", error.code) from error


def _check_split(
    args: argparse.Namespace, flag: str, data_sets: list[IndexedReader], number: int, share: tuple[float, float]
) -> list[int]:
    """Return each data set's tokens in a split. Check that there are some, and a whole sequence where it is needed."""
    tokens = []
    for data in data_sets:
        first, last = (round(end * len(data.lengths)) for end in share)
        tokens.append(int(data.lengths[first:last].sum(dtype=np.int64)))
    if 0 in tokens:
        empty = data_sets[tokens.index(0)]
        split = f"--split {args.split}" if flag in ("--data-path", "--data-args-path") else flag
        raise DataError(
            f"{flag} {empty.prefix}: the {SPLITS[number]} split gets none of its {len(empty.lengths):,} document(s) "
            f"({split}). Give more documents, or a different --split; 0 turns a split off (training only: 100,0,0 with "
            "--eval-iters 0).",
            "REMOE-E304",
        )
    is_read_whole = number == 1 and args.full_validation
    if (is_read_whole or (len(tokens) == 1 and number == 0)) and (fewest := min(tokens)) <= args.seq_length:
        raise DataError(
            f"{flag} {data_sets[tokens.index(fewest)].prefix}: has {fewest:,} tokens for {SPLITS[number]}, not one "
            f"sequence of --seq-length {args.seq_length} and a token. Give more data, or a shorter --seq-length.",
            "REMOE-E304",
        )
    return tokens


def count_evaluations(args: argparse.Namespace, steps: int) -> int:
    """Return how many times a run evaluates in its first steps, without the evaluation at the end."""
    first = args.start_eval_at_iter or 1
    return max(steps // args.eval_interval - (first - 1) // args.eval_interval, 0)


def _check_blend(args: argparse.Namespace, flag: str, tokens: list[int], number: int) -> None:
    """Check that data sets without weights, which Megatron reads once, have enough sequences for the whole run."""
    if len(tokens) == 1 or args.skip_train or (number == 1 and args.multiple_validation_sets):
        return
    wanted = args.train_samples or args.train_iters * args.global_batch_size
    if number:
        steps = 0 if args.step_batch_size_schedule else wanted // args.global_batch_size  # unknown with a schedule
        evaluations = count_evaluations(args, steps) if number == 1 else 0
        wanted = (evaluations + 1) * args.eval_iters * args.eval_global_batch_size
    if (held := sum((each - 1) // args.seq_length for each in tokens)) < wanted:
        raise DataError(
            f"{flag}: its {SPLITS[number]} data has {held:,} sequences, and the run reads {wanted:,}. Megatron repeats "
            "only data sets with weights: give one before each prefix.",
            "REMOE-E303",
        )


def _blends(args: argparse.Namespace) -> Iterator[tuple[str, Blend, list[tuple[float, float] | None]]]:
    """Yield the flag, the data sets with weights, and the split matrix of each blend."""
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
        given = args.data_args_path or args.per_split_data_args_path or "--data-path and the like"
        raise DataError(
            f"{given}: cannot be read ({error!r}). Give prefixes, all or none of them with a weight before it; in "
            "--per-split-data-args-path, JSON with train, valid and test.",
            "REMOE-E303",
        ) from error
    if blend is not None:
        split = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
        yield "--data-path" if args.data_path else "--data-args-path", blend, split
    elif per_split is not None and any(per_split):
        for number, (name, part) in enumerate(zip(("train", "valid", "test"), per_split, strict=True)):
            if part is not None:
                flag = f"--{name}-data-path" if args.per_split_data_args_path is None else "--per-split-data-args-path"
                yield flag, part, [(0.0, 1.0) if i == number else None for i in range(len(SPLITS))]
    else:
        raise DataError(
            "--data-path is missing: give the prefix of a .bin/.idx pair, without suffix (remoe preprocess makes one), "
            "or --mock-data to try things out.",
            "REMOE-E301",
        )
