"""Shorten paths to names, unless two names would be equal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def of_models(places: Sequence[Path]) -> list[str]:
    """Return names for runs, given by folder or --save, or for exported folders."""
    folders = [place.parent if place.name == "checkpoints" else place for place in map(Path.resolve, places)]
    return _unless_equal([folder.name for folder in folders], list(map(str, places)))


def of_data_sets(prefixes: Sequence[str]) -> list[str]:
    """Return names for Megatron's data sets."""
    return _unless_equal([Path(prefix).name.removesuffix("_text_document") for prefix in prefixes], list(prefixes))


def by_model[Found](found: Mapping[str, Found]) -> Iterator[tuple[str, Found]]:
    """Yield short name and results of each model."""
    return zip(of_models([Path(model) for model in found]), found.values(), strict=True)


def _unless_equal(short: list[str], whole: list[str]) -> list[str]:
    return short if len(set(short)) == len(short) else whole
