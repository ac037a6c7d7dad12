"""How often a training sees its data."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.core.datasets.utils import get_blend_from_list
from megatron.remoe.data.errors import DataError
from megatron.remoe.data.indexed import IndexedReader


def count_tokens(prefix: str) -> int | None:
    """Return the tokens of a data set; None if it is not there or not in Megatron's format."""
    try:
        return IndexedReader(Path(prefix), thorough=False).tokens
    except (DataError, OSError):
        return None


def epochs_line(args: argparse.Namespace, sequences: int) -> str | None:
    """Return how many epochs a training of so many sequences has; None if its data are not there.

    With weights, data sets have different numbers of epochs.
    """
    words, share = (args.train_data_path, 1.0) if args.train_data_path else (args.data_path, _share(args.split))
    blend = get_blend_from_list(words)
    counts = [count_tokens(prefix) for prefix in blend[0]] if blend else []
    if not blend or not all(counts) or not share:
        return None
    wanted, sizes = sequences * args.seq_length, [share * count for count in counts if count]
    weights = blend[1] or sizes
    epochs = [wanted * weight / sum(weights) / size for weight, size in zip(weights, sizes, strict=True)]
    return (
        f"Data: {sum(sizes):,.0f} tokens to train on in {len(sizes)} data set{'s' * (len(sizes) > 1)}; "
        f"{_range(epochs)} epochs"
    )


def _share(split: str | None) -> float:
    """Return the training set's share by --split."""
    parts = [float(part) for part in (split or "1").split(",")]
    return parts[0] / sum(parts)


def _range(epochs: Sequence[float]) -> str:
    least, most = f"{min(epochs):.3g}", f"{max(epochs):.3g}"
    return least if least == most else f"{least} to {most}"
