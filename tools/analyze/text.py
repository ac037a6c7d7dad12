"""Held-out text as sequences, read as they are needed."""

from pathlib import Path

import numpy
import torch

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.indexed import IndexedReader

from ..common.errors import ToolError


class Text:
    """A data set in sequences of one length, in a random order that a seed gives; what is left at the end is not read.

    Args:
        prefix: of the .bin and .idx files.
        length: tokens of a sequence.
        seed: of the order.
        vocabulary: number of tokens that the model knows.

    Raises:
        ToolError: the files are missing, corrupt or too small.
    """

    def __init__(self, prefix: str, length: int, seed: int, vocabulary: int) -> None:
        try:
            self._reader = IndexedReader(Path(prefix))
        except DataError as error:
            raise ToolError(f"--data-path: {error}") from error
        self.prefix, self.length, self._vocabulary = prefix, length, vocabulary
        self.tokens = self._reader.tokens
        self._order = numpy.random.default_rng(seed).permutation(self.tokens // length)
        if not len(self):
            raise ToolError(
                f"--data-path {prefix}: has {self.tokens:,} tokens, fewer than one sequence of {length}. Give more "
                "text, or a smaller --seq-length."
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._order)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Sequences as int64 `[stop - start, length]`.

        Raises:
            ToolError: one holds a token that the model does not know.
        """
        places = self._order[start:stop].tolist()
        ids = numpy.stack([self._reader.read(place * self.length, self.length) for place in places])
        if ids.max() >= self._vocabulary:
            raise ToolError(
                f"--data-path {self.prefix}: holds token {ids.max()}, and the model knows {self._vocabulary}. Give "
                "text that was tokenized for it."
            )
        return torch.from_numpy(ids.astype(numpy.int64))
