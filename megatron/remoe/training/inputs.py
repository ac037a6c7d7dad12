"""What a user gives a training, checked before it starts: environment, flags that must be there, data, output folders.

Every rank checks for itself, from headers and small samples. Forms that are not known here are left to Megatron.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.remoe.data.errors import DataError
from megatron.remoe.data.indexed import HEADER, MAGIC, TYPES, VERSION, bin_path, idx_path
from megatron.training.utils import get_blend_and_blend_per_split

TOKENS_SAMPLED = 2_000_000
LENGTHS_AT_ONCE = 1 << 16
SPLITS = ("training", "validation", "test")
Blend = tuple[list[str], list[float] | None]


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Whether the variables that torchrun sets make sense.

    Raises:
        ValueError: names the variable, its value and the remedy.
    """
    remedy = "torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT: use it, or unset them all."
    rank = environment.get("RANK", "0")
    size = environment.get("WORLD_SIZE", "1")
    for name, text in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", environment.get("LOCAL_RANK", "0"))):
        if not text.isdecimal():
            raise ValueError(f"{name}={text!r} in the environment is not a whole number. {remedy}")
    if int(rank) >= int(size):
        raise ValueError(f"RANK={rank} in the environment must be below WORLD_SIZE={size}. {remedy}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if "RANK" in environment and not environment.get(name):
            raise ValueError(f"RANK={rank} is set in the environment and {name} is not. {remedy}")
    port = environment.get("MASTER_PORT", "0")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"MASTER_PORT={port!r} in the environment is not a port: choose one from 1024 to 65535.")


def check_required_flags(args: argparse.Namespace) -> None:
    """Flags without a default that Megatron asks for late, or does not name.

    Raises:
        ValueError: lists all that are missing.
    """
    hybrid = args.hybrid_layer_pattern or args.hybrid_override_pattern
    heterogeneous = args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json
    needed = {
        "--num-layers": args.num_layers or args.encoder_num_layers or hybrid or heterogeneous,
        "--hidden-size": args.hidden_size or heterogeneous,
        "--num-attention-heads": args.num_attention_heads or heterogeneous,
        "--seq-length": args.seq_length or args.encoder_seq_length,
        "--max-position-embeddings": args.max_position_embeddings or heterogeneous,
        "--micro-batch-size": args.micro_batch_size,
        "--lr": args.lr is not None or args.skip_train,
        "--train-iters": args.train_iters is not None or args.train_samples or args.skip_train,
        "--eval-interval": args.eval_interval or args.skip_train or args.full_validation,
        "--save-interval (with --save)": not args.save or args.save_interval,
        "--vocab-size (with --tokenizer-type NullTokenizer)": args.tokenizer_type != "NullTokenizer" or args.vocab_size,
    }
    missing = [flag for flag, given in needed.items() if not given]
    if missing:
        raise ValueError(f"Missing: {', '.join(missing)}. Give a value above 0; there is no default.")


def check_output_folders(args: argparse.Namespace) -> None:
    """Make the folders that the training will write into, and whether that can be done.

    Raises:
        ValueError: names flag, path and reason.
    """
    for flag, folder in (
        ("--save", args.save),
        ("--tensorboard-dir", args.tensorboard_dir),
        ("--data-cache-path", args.data_cache_path),
    ):
        if not folder or "://" in folder:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"{flag} {folder}: cannot be written ({error.strerror or error}). Give a folder that can."
            ) from error


@dataclass(frozen=True)
class DataSet:
    """The header of a .bin/.idx pair, and its sequences' lengths, mapped.

    Attributes:
        prefix: path of the pair without suffix.
        dtype: type of a token.
        lengths: number of tokens of each sequence; shape [sequences].
        tokens: number of tokens in the .bin file.
    """

    prefix: Path
    dtype: np.dtype
    lengths: npt.NDArray[np.int32]
    tokens: int

    def has_tokens(self, first: int, last: int, wanted: int) -> bool:
        """Whether sequences first to last - 1 have `wanted` tokens; reads no more lengths than needed."""
        for i in range(first, last, LENGTHS_AT_ONCE):
            wanted -= int(self.lengths[i : min(i + LENGTHS_AT_ONCE, last)].sum(dtype=np.int64))
            if wanted <= 0:
                return True
        return False


def open_data_set(prefix: str, flag: str) -> DataSet:
    """Read the header of a data set and compare the sizes of both files with it.

    Raises:
        DataError: a file is missing, truncated or corrupt; names flag, file and remedy.
    """
    path = Path(prefix)
    index, tokens = idx_path(path), bin_path(path)
    missing = [str(file) for file in (index, tokens) if not file.is_file()]
    if missing:
        bare = path.with_suffix("")
        if path.suffix in (".bin", ".idx") and idx_path(bare).is_file():
            raise DataError(f"{flag} {prefix}: give the prefix without suffix: {bare}")
        raise DataError(
            f"{flag} {prefix}: there is no {' and no '.join(missing)}. Give the prefix of a .bin/.idx pair, without "
            "suffix; tools/preprocess_data.py makes one."
        )
    try:
        with index.open("rb") as file:
            header = file.read(HEADER.size)
        size, token_bytes = index.stat().st_size, tokens.stat().st_size
    except OSError as error:
        raise DataError(f"{flag} {prefix}: {error.filename}: cannot be read ({error.strerror}).") from error

    def corrupt(file: Path, why: str) -> DataError:
        return DataError(
            f"{flag} {prefix}: {file} is truncated or corrupt: {why}. Copy the pair again, or make it anew with "
            "tools/preprocess_data.py."
        )

    if len(header) < HEADER.size:
        raise corrupt(index, f"{len(header)} bytes, fewer than the {HEADER.size} of a header")
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or code not in TYPES:
        raise corrupt(index, "it does not begin with the header of a Megatron index")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size < expected:
        raise corrupt(index, f"it has {size:,} of {expected:,} bytes")
    dtype = np.dtype(TYPES[code])
    if not sequences:
        return DataSet(path, dtype, np.empty(0, np.int32), 0)
    data = np.memmap(index, mode="r")
    lengths = data[HEADER.size :][: 4 * sequences].view("<i4")
    pointers = data[HEADER.size + 4 * sequences :][: 8 * sequences].view("<i8")
    end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if token_bytes < end:
        raise corrupt(tokens, f"it has {token_bytes:,} bytes, and its index tells of {end:,}")
    return DataSet(path, dtype, lengths, token_bytes // dtype.itemsize)


def check_data(args: argparse.Namespace) -> None:
    """Whether the data sets are there and whole, and whether each split has something to train or evaluate on.

    Megatron takes an empty split's epochs one by one until they have enough tokens: without end.

    Args:
        args: Megatron's arguments, validated.

    Raises:
        DataError: names flag, data set, reason and remedy.
    """
    if args.mock_data or args.perform_rl_step:
        return
    for flag, blend, split in _blends(args):
        prefixes, weights = blend
        used = [prefix for prefix, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True) if weight]
        if not used:
            raise DataError(f"{flag}: all weights are 0: give at least one data set a weight above 0.")
        if any(not _is_local(prefix) for prefix in used):
            continue
        data_sets = [open_data_set(prefix, flag) for prefix in used]
        for number, share in enumerate(split):
            if share is not None:
                # Without weights, data sets that have nothing for a split are not asked for it.
                _check_split(args, flag, data_sets, SPLITS[number], share, each=weights is not None)
        if split[0] is None and flag in ("--data-path", "--data-args-path") and not args.skip_train:
            raise DataError(f"--split {args.split}: leaves nothing to train on: the first of its numbers is 0.")


def check_vocabulary(args: argparse.Namespace) -> None:
    """Whether the model's vocabulary holds the ids in the data: those at the beginning and the end of each data set.

    Args:
        args: Megatron's arguments, after it has built the tokenizer.

    Raises:
        DataError: names data set, id, the vocabulary's size and the remedy.
    """
    if args.mock_data or args.perform_rl_step or not args.padded_vocab_size:
        return
    blends = [(flag, prefix) for flag, (prefixes, _), _ in _blends(args) for prefix in prefixes if _is_local(prefix)]
    for flag, prefix in blends:
        data = open_data_set(prefix, flag)
        if not data.tokens or data.dtype.kind not in "iu":
            continue
        at_once = max(TOKENS_SAMPLED // (2 * len(blends)), 1000)
        for offset in {0, max(data.tokens - at_once, 0)}:
            ids = np.fromfile(
                bin_path(data.prefix), dtype=data.dtype, count=at_once, offset=offset * data.dtype.itemsize
            )
            largest, smallest = int(ids.max()), int(ids.min())
            if smallest < 0 or largest >= args.padded_vocab_size:
                wrong = smallest if smallest < 0 else largest
                raise DataError(
                    f"{flag} {prefix}: holds token {wrong}, and the vocabulary has {args.padded_vocab_size} "
                    f"(--tokenizer-type {args.tokenizer_type}, padded). Give the tokenizer that the data was made with."
                )


def _check_split(
    args: argparse.Namespace, flag: str, data_sets: list[DataSet], name: str, share: tuple[float, float], each: bool
) -> None:
    split = f"--split {args.split}" if flag in ("--data-path", "--data-args-path") else flag
    # As Megatron divides: by sequences, which are documents, rounded.
    sizes = [float(len(data.lengths)) for data in data_sets]
    ranges = [(round(share[0] * size), round(share[1] * size)) for size in sizes]
    filled = [data.has_tokens(*bounds, 1) for data, bounds in zip(data_sets, ranges, strict=True)]
    if not any(filled) or (each and not all(filled)):
        empty = data_sets[filled.index(False)]
        documents = f"{len(empty.lengths):,} document" + ("s" if len(empty.lengths) != 1 else "")
        raise DataError(
            f"{flag} {empty.prefix}: of its {documents} the {name} split gets nothing ({split}). Give more documents, "
            "or another --split, in which 0 turns a split off (100,0,0 with --eval-iters 0: training alone)."
        )
    if name == "training" and len(data_sets) == 1 and not data_sets[0].has_tokens(*ranges[0], args.seq_length + 1):
        tokens = int(data_sets[0].lengths[slice(*ranges[0])].sum(dtype=np.int64))
        raise DataError(
            f"{flag} {data_sets[0].prefix}: has {tokens:,} tokens for training, not even one sequence of --seq-length "
            f"{args.seq_length} and the token after it. Give more data, or a shorter --seq-length."
        )


def _blends(args: argparse.Namespace) -> Iterator[tuple[str, Blend, list[tuple[float, float] | None]]]:
    """Flag, data sets and the split matrix of each blend."""
    for flag, words in (
        ("--data-path", args.data_path),
        ("--train-data-path", args.train_data_path),
        ("--valid-data-path", args.valid_data_path),
        ("--test-data-path", args.test_data_path),
    ):
        _check_weights(flag, words or [])
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
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
