"""Takes sequences of tokens from Megatron data sets, without a tokenizer."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron.remoe.data.errors import DataError
from megatron.remoe.data.indexed import IndexedReader, bin_path
from megatron.training.utils.common_utils import get_blend_and_blend_per_split, get_blend_from_list

from .errors import ConversionError


@dataclass(frozen=True)
class Blend:
    """Data sets and how much to take of each (None: in proportion to their size)."""

    prefixes: list[str]
    weights: list[float] | None


def blend_of(args: argparse.Namespace, data_path: list[str] | None) -> Blend:
    """The data sets to take text from: those given, otherwise those of the training.

    Raises:
        ConversionError: there are none.
    """
    try:
        if data_path:
            blend = get_blend_from_list(data_path)
        else:
            blend, per_split = get_blend_and_blend_per_split(args)
            blend = blend or (per_split and per_split[0])
    except (OSError, ValueError, AssertionError) as error:
        raise ConversionError(f"the data sets cannot be read: {error}. Name them with --data-path.") from error
    if not blend:
        raise ConversionError("the checkpoint names no data sets to fit the routers to: give --data-path.")
    return Blend(*blend)


def sample(blend: Blend, sequences: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Different stretches of text, at random.

    Args:
        blend: where to take them from.
        sequences: how many.
        length: tokens of each, without the one after the last, which comes with it.
        vocabulary: number of tokens that the model knows.
        seed: of the choice.

    Returns:
        int64 `[sequences, length + 1]`; no two overlap but for that last token.

    Raises:
        ConversionError: a data set is missing, corrupt or too small, or was made with another vocabulary.
    """
    sets = [_tokens(prefix) for prefix in blend.prefixes]
    sizes = np.array([len(tokens) for tokens in sets], dtype=np.float64)
    shares = sizes if blend.weights is None else np.array(blend.weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(sequences, shares / shares.sum())
    found = []
    for prefix, tokens, count in zip(blend.prefixes, sets, counts, strict=True):
        available = max(0, len(tokens) - 1) // length
        if count > available:
            raise ConversionError(
                f"{prefix}: {len(tokens):,} tokens, where {count * length + 1:,} are needed. Give more text with "
                "--data-path, or ask for less of it with --tokens."
            )
        starts = generator.choice(available, size=count, replace=False) * length
        found += [np.asarray(tokens[start : start + length + 1], dtype=np.int64) for start in starts]
    chosen = np.stack([found[i] for i in generator.permutation(len(found))])
    if chosen.max() >= vocabulary:
        raise ConversionError(
            f"{' '.join(blend.prefixes)}: holds token {chosen.max()}, and the checkpoint's vocabulary has only "
            f"{vocabulary}. Give text that was tokenized for this model with --data-path."
        )
    return torch.from_numpy(chosen)


def _tokens(prefix: str) -> np.ndarray:
    path = Path(prefix)
    try:
        reader = IndexedReader(path)
    except DataError as error:
        raise ConversionError(f"{error} Name the data sets with --data-path.") from error
    if not reader.tokens:
        raise ConversionError(f"{bin_path(path)}: holds no tokens. Give other text with --data-path.")
    return np.memmap(bin_path(path), dtype=reader.dtype, mode="r")
