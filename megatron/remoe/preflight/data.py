"""The data sets of a training, checked before it starts.

Every rank checks for itself, from headers and small samples. Forms that are not known here are left to Megatron.
"""

import argparse
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.remoe.data.errors import DataError
from megatron.remoe.data.indexed import IndexedReader, idx_path

TOKENS_SAMPLED = 2_000_000
LENGTHS_AT_ONCE = 1 << 16
SPLITS = ("training", "validation", "test")
Blend = tuple[list[str], list[float] | None]
BlendReader = Callable[[argparse.Namespace], tuple[Blend | None, list[Blend | None] | None]]


def check_data(args: argparse.Namespace, read_blends: BlendReader) -> None:
    """Whether the data sets are there and whole, and whether each split has something to train or evaluate on.

    Megatron takes an empty split's epochs one by one until they have enough tokens: without end.

    Args:
        args: Megatron's arguments, validated.
        read_blends: Megatron's `get_blend_and_blend_per_split`.

    Raises:
        DataError: names flag, data set, reason and remedy.
    """
    if args.mock_data or args.perform_rl_step:
        return
    for flag, blend, split in _blends(args, read_blends):
        prefixes, weights = blend
        used = [prefix for prefix, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True) if weight]
        if not used:
            raise DataError(f"{flag}: all weights are 0: give at least one data set a weight above 0.")
        if any(not _is_local(prefix) for prefix in used):
            continue
        data_sets = [_open(prefix, flag) for prefix in used]
        for number, share in enumerate(split):
            if share is not None:
                if number == 2 and args.multiple_validation_sets:
                    raise DataError(
                        f"{flag}: --multiple-validation-sets cannot be used with a test set, at which Megatron fails "
                        "after the training. Leave it out, or give 0 as the third number of --split."
                    )
                _check_split(args, flag, data_sets, SPLITS[number], share)
                if weights is None and len(used) > 1:
                    _check_unweighted(args, flag, data_sets, number, share)
        if split[0] is None and flag in ("--data-path", "--data-args-path") and not args.skip_train:
            raise DataError(f"--split {args.split}: leaves nothing to train on: the first of its numbers is 0.")


def check_vocabulary(args: argparse.Namespace, read_blends: BlendReader) -> None:
    """Whether the model's vocabulary holds the ids in the data: those at the beginning and the end of each data set.

    Args:
        args: Megatron's arguments, after it has built the tokenizer.
        read_blends: Megatron's `get_blend_and_blend_per_split`.

    Raises:
        DataError: names data set, id, the vocabulary's size and the remedy.
    """
    if args.mock_data or args.perform_rl_step or not args.padded_vocab_size:
        return
    blends = [
        (flag, prefix)
        for flag, (prefixes, _), _ in _blends(args, read_blends)
        for prefix in prefixes
        if _is_local(prefix)
    ]
    for flag, prefix in blends:
        data = _open(prefix, flag)
        if not data.tokens or data.dtype.kind not in "iu":
            continue
        at_once = max(TOKENS_SAMPLED // (2 * len(blends)), 1000)
        for start in {0, max(data.tokens - at_once, 0)}:
            ids = data.read(start, at_once)
            largest, smallest = int(ids.max()), int(ids.min())
            if smallest < 0 or largest >= args.padded_vocab_size:
                wrong = smallest if smallest < 0 else largest
                raise DataError(
                    f"{flag} {prefix}: holds token {wrong}, and the vocabulary has {args.padded_vocab_size} "
                    f"(--tokenizer-type {args.tokenizer_type}, padded). Give the tokenizer that the data was made with."
                )


def _open(prefix: str, flag: str) -> IndexedReader:
    path = Path(prefix)
    bare = path.with_suffix("")
    if path.suffix in (".bin", ".idx") and not idx_path(path).is_file() and idx_path(bare).is_file():
        raise DataError(f"{flag} {prefix}: give the prefix without suffix: {bare}")
    try:
        return IndexedReader(path, thorough=False)
    except DataError as error:
        raise DataError(f"{flag} {prefix}: {error}") from error
    except OSError as error:
        raise DataError(f"{flag} {prefix}: {error.filename}: cannot be read ({error.strerror}).") from error


def _has_tokens(lengths: npt.NDArray[np.int32], wanted: int) -> bool:
    """Whether sequences of these lengths have as many tokens; reads no more lengths than needed."""
    for i in range(0, len(lengths), LENGTHS_AT_ONCE):
        wanted -= int(lengths[i : i + LENGTHS_AT_ONCE].sum(dtype=np.int64))
        if wanted <= 0:
            return True
    return False


def _check_split(
    args: argparse.Namespace,
    flag: str,
    data_sets: list[IndexedReader],
    name: str,
    share: tuple[float, float],
) -> None:
    split = f"--split {args.split}" if flag in ("--data-path", "--data-args-path") else flag
    parts = [_part(data, share) for data in data_sets]
    filled = [_has_tokens(lengths, 1) for lengths in parts]
    if not all(filled):
        empty = data_sets[filled.index(False)]
        documents = f"{len(empty.lengths):,} document" + ("s" if len(empty.lengths) != 1 else "")
        raise DataError(
            f"{flag} {empty.prefix}: of its {documents} the {name} split gets nothing ({split}). Give more documents, "
            "or another --split, in which 0 turns a split off (100,0,0 with --eval-iters 0: training alone)."
        )
    if name == "training" and len(data_sets) == 1 and not _has_tokens(parts[0], args.seq_length + 1):
        raise DataError(
            f"{flag} {data_sets[0].prefix}: has {parts[0].sum(dtype=np.int64):,} tokens for training, not even one "
            f"sequence of --seq-length {args.seq_length} and the token after it. Give more data, or a shorter "
            "--seq-length."
        )


def _check_unweighted(
    args: argparse.Namespace, flag: str, data_sets: list[IndexedReader], number: int, share: tuple[float, float]
) -> None:
    """Several data sets without weights, of which Megatron takes one epoch: each has a part in it, and it suffices."""
    tokens = [int(_part(data, share).sum(dtype=np.int64)) for data in data_sets]
    sequences = [max((some - 1) // args.seq_length, 0) for some in tokens]
    if 0 in sequences:
        raise DataError(
            f"{flag} {data_sets[sequences.index(0)].prefix}: has not even one sequence of --seq-length "
            f"{args.seq_length} for {SPLITS[number]}, and could not be mixed in. Leave it out, or give another --split."
        )
    wanted = _sequences_wanted(args)[number]
    if wanted is None or wanted <= sum(sequences) or args.dataloader_type == "cyclic":
        return
    weighted = " ".join(f"{some} {data.prefix}" for some, data in zip(sequences, data_sets, strict=True))
    raise DataError(
        f"{flag}: {wanted:,} sequences are wanted for {SPLITS[number]}, and the {len(data_sets)} data sets have "
        f"{sum(sequences):,}. Without weights Megatron goes through them once and fails at their end. Put a "
        f"weight before each; by their sizes: {textwrap.shorten(weighted, 500, placeholder=' ...')}"
    )


def _sequences_wanted(args: argparse.Namespace) -> tuple[int | None, int | None, int | None]:
    """What Megatron asks of each split (`get_train_valid_test_num_samples`); None: nothing, or all that there is."""
    once = args.eval_iters * args.eval_global_batch_size
    if args.skip_train:
        return None, None if args.full_validation else once, once
    training = args.train_samples or args.train_iters * args.global_batch_size
    iterations = args.train_iters or training // args.global_batch_size
    evaluations = iterations // args.eval_interval + 1 - (args.start_eval_at_iter or 0) // args.eval_interval
    return training, None if args.full_validation else max(evaluations, 0) * once, once


def _part(data: IndexedReader, share: tuple[float, float]) -> npt.NDArray[np.int32]:
    """The lengths of a split's sequences; as Megatron divides: by sequences, which are documents, rounded."""
    return data.lengths[slice(*(round(end * float(len(data.lengths))) for end in share))]


def _blends(
    args: argparse.Namespace, read_blends: BlendReader
) -> Iterator[tuple[str, Blend, list[tuple[float, float] | None]]]:
    """Flag, data sets and the split matrix of each blend."""
    for flag, words in (
        ("--data-path", args.data_path),
        ("--train-data-path", args.train_data_path),
        ("--valid-data-path", args.valid_data_path),
        ("--test-data-path", args.test_data_path),
    ):
        _check_weights(flag, words or [])
    try:
        blend, per_split = read_blends(args)
    except OSError as error:
        raise DataError(f"The list of data sets {error.filename} cannot be read ({error.strerror}).") from error
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
            "makes one), or --mock-data to try things out."
        )


def _split_matrix(split: str | None) -> list[tuple[float, float] | None]:
    if split is None:
        raise DataError("--split is missing: give it with --data-args-path, for instance --split 969,30,1.")
    words = [word.strip() for word in split.split(",")]
    numbers = [float(word) for word in words if re.fullmatch(r"\d+\.?\d*|\.\d+", word)]
    if len(numbers) < len(words) or len(words) > len(SPLITS) or not sum(numbers):
        raise DataError(
            f"--split {split}: give up to three numbers, for training, validation and test, for instance 969,30,1."
        )
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


def _check_weights(flag: str, words: list[str]) -> None:
    """Megatron takes prefixes alone, or a weight before each; it takes a mixture of both for prefixes."""
    numbers = [None if idx_path(Path(word)).exists() else _number(word) for word in words]
    if len(words) < 2 or not any(number is not None for number in numbers[::2]):
        return
    shown = " ".join(words[:4]) + (" ..." if len(words) > 4 else "")
    if len(words) % 2 or None in numbers[::2]:
        odd = next((word for word, number in zip(words[::2], numbers[::2], strict=True) if number is None), words[-1])
        raise DataError(f"{flag} {shown}: {odd!r} stands where a weight belongs: put one number before each prefix.")
    wrong = next((word for word, number in zip(words[::2], numbers[::2], strict=True) if not _is_weight(number)), None)
    if wrong is not None:
        raise DataError(f"{flag} {shown}: the weight {wrong} must be a number of at least 0.")


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _is_weight(number: float | None) -> bool:
    return number is not None and 0.0 <= number < float("inf")


def _is_local(prefix: str) -> bool:
    return "://" not in prefix
