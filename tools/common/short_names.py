"""Short names for paths; whole paths if two names would be equal."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def of_models(places: Sequence[Path]) -> list[str]:
    """Return names of runs, given by folder or --save, or of exported folders."""
    folders = [place.parent if place.name == "checkpoints" else place for place in map(Path.resolve, places)]
    return _told_apart([folder.name for folder in folders], list(map(str, places)))


def of_data_sets(prefixes: Sequence[str]) -> list[str]:
    """Return names of Megatron's data sets."""
    return _told_apart([Path(prefix).name.removesuffix("_text_document") for prefix in prefixes], list(prefixes))


def by_model[Found](found: Mapping[str, Found]) -> Iterator[tuple[str, Found]]:
    """Yield the results of each model under short names instead of paths."""
    return zip(of_models([Path(model) for model in found]), found.values(), strict=True)


def _told_apart(short: list[str], whole: list[str]) -> list[str]:
    return short if len(set(short)) == len(short) else whole
