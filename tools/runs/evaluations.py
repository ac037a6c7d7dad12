"""Tabulate the results of remoe evaluate, with short names of models and data sets."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..console.places import run_folder

BY_LAYER = "mean/99%/largest by layer"
EXPLAINED = "Experts per token: the mean; the most that 99 % of the tokens have; the largest."
Results = tuple[tuple[str, ...], list[list[str]]]  # titles of the columns, and rows, of one kind of result


def tables(results: dict[str, Any]) -> Iterator[Results]:
    """Yield a table for each kind of result in the content of an `--output` file."""
    for kind, make in (("text", _on_text), ("speed", _on_speed), ("tasks", _on_tasks)):
        if kind in results:
            names = names_of_models([Path(model) for model in results[kind]])
            yield make(dict(zip(names, results[kind].values(), strict=True)))


def _on_text(models: dict[str, Any]) -> Results:
    rows = []
    for model, sets in models.items():
        for data_set, bounds in zip(names_of_data_sets([*sets]), sets.values(), strict=True):
            for bound, one in bounds.items():
                loss, layers = one["loss"], one["experts"].values()
                mean = f"{sum(layer['mean'] for layer in layers) / len(layers):.3f}" if layers else ""
                each = (f"{layer['mean']:.2f}/{layer['percentile_99']}/{layer['largest']}" for layer in layers)
                rows.append([model, data_set, bound, f"{loss:.5f}", f"{math.exp(loss):.4f}", mean, " ".join(each)])
    titles = ("model", "data set", "K", "nats/token", "perplexity", "experts", BY_LAYER)
    return titles, rows


def _on_speed(models: dict[str, Any]) -> Results:
    first, rows = next(iter(models.values())), []
    for model, one in models.items():
        pairs = ((f"{one[what]:,.0f}", f"{one[what] / first[what]:.2f}") for what in ("prefill", "decode"))
        rows.append([model, *(cell for pair in pairs for cell in pair)])
    return ("model", "reading, tokens/s", "ratio", "writing, tokens/s", "ratio"), rows


def _on_tasks(models: dict[str, Any]) -> Results:
    rows = []
    for model, scores in models.items():
        for one in scores:
            error = "" if one["error"] is None else f"{one['error']:.4f}"
            rows.append([model, one["task"], one["metric"], f"{one['value']:.4f}", error, str(one["documents"])])
    return ("model", "task", "metric", "value", "± standard error", "documents"), rows


def names_of_models(places: Sequence[Path]) -> list[str]:
    """Return short names for runs, given by folder or --save, or for exported folders; paths if two would be equal."""
    short = [run_folder(place.resolve()).name for place in places]
    return short if len(set(short)) == len(short) else [str(place) for place in places]


def names_of_data_sets(prefixes: Sequence[str]) -> list[str]:
    """Return short names for Megatron's data sets; prefixes if two would be equal."""
    short = [Path(prefix).name.removesuffix("_text_document") for prefix in prefixes]
    return short if len(set(short)) == len(short) else [*prefixes]
