"""Read sequences of tokens from Megatron data sets."""

import argparse
from pathlib import Path

import numpy
import torch

from megatron.remoe.files.indexed import IndexedReader

from ..console.errors import ToolError

# Prefixes of data sets, and their weights (None: in proportion to their size).
Blend = tuple[list[str], list[float] | None]


class Text:
    """A data set cut into sequences of equal length, in a random order; an incomplete last one is left out.

    Args:
        prefix: of the .bin and .idx files.
        length: tokens of a sequence.
        seed: of the order.
        vocabulary: size of the model's vocabulary.

    Raises:
        UsageError: the files are missing, corrupt or too small.
    """

    def __init__(self, prefix: str, length: int, seed: int, vocabulary: int) -> None:
        self.prefix, self.length, self._vocabulary = prefix, length, vocabulary
        self._reader = open_data_set(prefix, length)
        self._order = numpy.random.default_rng(seed).permutation(self._reader.tokens // length)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._order)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return sequences as int64 `[stop - start, length]`.

        Raises:
            ToolError: a token is not in the model's vocabulary.
        """
        places = self._order[start:stop].tolist()
        ids = numpy.stack([self._reader.read(place * self.length, self.length) for place in places])
        check_vocabulary(self.prefix, int(ids.max()), self._vocabulary)
        return torch.from_numpy(ids.astype(numpy.int64))


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
    """Refuse text that was tokenized for another model.

    Raises:
        ToolError: the largest token is not in the vocabulary.
    """
    if largest >= vocabulary:
        raise ToolError(
            f"--data-path {prefix}: holds token {largest}, but the model has {vocabulary} tokens. Give text that was "
            "tokenized for it.",
            "REMOE-E305",
        )


def blend_of(args: argparse.Namespace, data_path: list[str] | None) -> Blend:
    """Return the data sets of `data_path`, or those of the training.

    Raises:
        ToolError: there are none.
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


def sample(blend: Blend, sequences: int, length: int, vocabulary: int, seed: int, or_else: str = "") -> torch.Tensor:
    """Return random sequences of text, int64 `[sequences, length + 1]`; two of them share at most the last token.

    `or_else` is a second remedy, for the message that there is too little text.

    Raises:
        UsageError: a data set is missing, corrupt or too small, or was made with another vocabulary.
    """
    prefixes, weights = blend
    readers = [open_data_set(prefix, 1) for prefix in prefixes]
    shares = numpy.array(weights or [reader.tokens for reader in readers], dtype=numpy.float64)
    generator = numpy.random.default_rng(seed)
    found = []
    counts = generator.multinomial(sequences, shares / shares.sum())
    for prefix, reader, count in zip(prefixes, readers, counts, strict=True):
        available = (reader.tokens - 1) // length
        if count > available:
            raise ToolError(
                f"{prefix}: has {reader.tokens:,} tokens, but {count * length + 1:,} are needed. Give more text with "
                f"--data-path{or_else}.",
                "REMOE-E304",
            )
        for start in generator.choice(available, size=count, replace=False) * length:
            found.append(reader.read(int(start), length + 1).astype(numpy.int64))
    chosen = numpy.stack([found[place] for place in generator.permutation(len(found))])
    check_vocabulary(" ".join(prefixes), int(chosen.max()), vocabulary)
    return torch.from_numpy(chosen)
