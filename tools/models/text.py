"""Read sequences of tokens from Megatron data sets."""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy
import torch

from megatron.remoe.files.indexed import IndexedReader

from ..console.errors import ToolError
from ..recipes.on_cpu import megatron_on_cpu
from .measuring import TOKENS_PER_FORWARD

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


def read_sequences(prefix: str, length: int, seed: int, vocabulary: int) -> "GPTDataset":
    """Return a data set's sequences as Megatron's `--full-validation` reads them: one epoch, in the order of a seed.

    Args:
        prefix: of the .bin and .idx files.
        length: input tokens of a sequence; the label of the last one is an additional token.
        seed: Megatron's --seed.
        vocabulary: number of tokens that the model knows.

    Raises:
        UsageError: the files are missing, corrupt or too small.
    """
    megatron_on_cpu()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    open_data_set(prefix, length + 1)
    # Megatron requires a tokenizer, but nothing here depends on it.
    tokenizer = SimpleNamespace(vocab_size=vocabulary, eod=0, pad=-1, unique_identifiers={})
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=length,
            blend=([prefix], None),
            split="0,100,0",
            path_to_cache=cache,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        data = GPTDataset.build_low_level_dataset(prefix, config)
        sequences = numpy.arange(len(data), dtype=numpy.int32)  # what Megatron calls documents
        return GPTDataset(data, prefix, sequences, None, Split.valid, config)


def read_batches(data: "GPTDataset", limit: int | None, vocabulary: int) -> Iterator[torch.Tensor]:
    """Yield the sequences, at most `limit`, as int64 `[batch, length + 1]`.

    Raises:
        ToolError: a token is not in the model's vocabulary.
    """
    length, number = data.config.sequence_length, min(len(data), limit or len(data))
    size = max(1, TOKENS_PER_FORWARD // length)
    for start in range(0, number, size):
        samples = [data[index] for index in range(start, min(number, start + size))]
        batch = torch.stack([torch.cat([sample["tokens"], sample["labels"][-1:]]) for sample in samples])
        check_vocabulary(data.dataset_path, int(batch.max()), vocabulary)
        yield batch


def open_data_set(prefix: str, least: int) -> IndexedReader:
    """Open a data set of at least `least` tokens.

    Raises:
        UsageError: its files are missing, corrupt or too small.
    """
    reader = IndexedReader(Path(prefix))
    if reader.tokens < least:
        raise ToolError(
            f"--data-path {prefix}: has {reader.tokens:,} tokens, fewer than one sequence of {least}. Give more text, "
            "or a smaller --seq-length.",
            "REMOE-E304",
        )
    return reader


def check_vocabulary(prefix: str, largest: int, vocabulary: int) -> None:
    """Refuse text that was tokenized for a different model.

    Raises:
        ToolError: the largest token is not in the vocabulary.
    """
    if largest >= vocabulary:
        raise ToolError(
            f"--data-path {prefix}: holds token {largest}, but the model has {vocabulary} tokens. Give text that was "
            "tokenized for it.",
            "REMOE-E305",
        )


def choose_blend(args: argparse.Namespace, data_path: list[str] | None) -> tuple[list[str], list[float] | None]:
    """Return the data sets of `data_path`, or the run's, and their weights (None: by their size).

    Raises:
        ToolError: there are none, or the flags or files that name them cannot be read.
    """
    from megatron.training.utils.common_utils import get_blend_and_blend_per_split, get_blend_from_list

    try:
        if data_path:
            blend = get_blend_from_list(data_path)
        else:
            blend, per_split = get_blend_and_blend_per_split(args)
            blend = blend or (per_split and per_split[0])
    except (OSError, ValueError, AssertionError) as error:
        raise ToolError(f"the data sets cannot be read: {error}. Give them with --data-path.", "REMOE-E303") from error
    if not blend:
        raise ToolError("the checkpoint names no data sets. Give --data-path.", "REMOE-E301")
    return blend


def sample(
    blend: tuple[list[str], list[float] | None], sequences: int, length: int, vocabulary: int, seed: int
) -> torch.Tensor:
    """Return random sequences of text, int64 `[sequences, length + 1]`; two of them overlap by at most one token.

    Raises:
        UsageError: a data set is missing, corrupt or too small, or was made with a different vocabulary.
    """
    prefixes, weights = blend
    readers = [open_data_set(prefix, 1) for prefix in prefixes]
    shares = numpy.array(weights or [reader.tokens for reader in readers], dtype=numpy.float64)
    generator = numpy.random.default_rng(seed)
    samples = []
    counts = generator.multinomial(sequences, shares / shares.sum())
    for prefix, reader, count in zip(prefixes, readers, counts, strict=True):
        available = (reader.tokens - 1) // length
        if count > available:
            raise ToolError(
                f"{prefix}: has {reader.tokens:,} tokens, but {count * length + 1:,} are needed. Give more text with "
                "--data-path, or a smaller --tokens if the tool has it.",
                "REMOE-E304",
            )
        for start in generator.choice(available, size=count, replace=False) * length:
            samples.append(reader.read(int(start), length + 1).astype(numpy.int64))
    chosen = numpy.stack([samples[place] for place in generator.permutation(len(samples))])
    check_vocabulary(" ".join(prefixes), int(chosen.max()), vocabulary)
    return torch.from_numpy(chosen)
