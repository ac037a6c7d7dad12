"""Give runs, exported folders and data sets short names for tables and pictures."""

from collections.abc import Sequence
from pathlib import Path

from ..console.places import run_folder


def name_models(places: Sequence[Path]) -> list[str]:
    """Return short names for runs, given by folder or --save, or for exported folders; paths if two would be equal."""
    short = [run_folder(place.resolve()).name for place in places]
    return short if len(set(short)) == len(short) else [str(place) for place in places]


def name_data_sets(prefixes: Sequence[str]) -> list[str]:
    """Return short names for Megatron's data sets; their prefixes if two would be equal."""
    short = [Path(prefix).name.removesuffix("_text_document") for prefix in prefixes]
    return short if len(set(short)) == len(short) else [*prefixes]
