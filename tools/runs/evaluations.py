"""Tabulate the results of remoe evaluate, with short names of models and data sets."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..console.places import run_folder

REPEATS, BY_LAYER = "repeats", "by layer"
EXPLAINED = {
    REPEATS: "Repeats: loss of tokens that complete a pair seen before in the sequence.",
    BY_LAYER: "By layer: experts per token (mean / 99th percentile / maximum).",
}
Results = tuple[tuple[str, ...], list[list[str]]]  # one kind of result: titles of the columns, and rows


def make_tables(results: dict[str, Any]) -> Iterator[Results]:
    """Yield a table for each kind of result in the content of an `--output` file."""
    for kind, make in (("text", _tabulate_text), ("speed", _tabulate_speed), ("tasks", _tabulate_tasks)):
        if kind in results:
            names = name_models([Path(model) for model in results[kind]])
            yield make(dict(zip(names, results[kind].values(), strict=True)))


def _tabulate_text(models: dict[str, Any]) -> Results:
    rows = []
    for model, sets in models.items():
        for data_set, bounds in zip(name_data_sets([*sets]), sets.values(), strict=True):
            for bound, measured in bounds.items():
                loss, repeats, layers = measured["loss"], measured["repeats_loss"], measured["experts"].values()
                mean = f"{sum(layer['mean'] for layer in layers) / len(layers):.3f}" if layers else ""
                by_layer = (f"{layer['mean']:.2f}/{layer['percentile_99']}/{layer['largest']}" for layer in layers)
                losses = [f"{loss:.4f}", "" if repeats is None else f"{repeats:.4f}"]
                k = "own" if bound == "none" else bound
                rows.append([model, data_set, k, *losses, mean, " ".join(by_layer)])
    titles = ("model", "data set", "K", "nats/token", REPEATS, "experts", BY_LAYER)
    return titles, rows


def _tabulate_speed(models: dict[str, Any]) -> Results:
    first, rows = next(iter(models.values())), []
    for model, rates in models.items():
        pairs = ((f"{rates[phase]:,.0f}", f"{rates[phase] / first[phase]:.2f}") for phase in ("prefill", "decode"))
        rows.append([model, *(cell for pair in pairs for cell in pair)])
    return ("model", "reading, tokens/s", "ratio", "writing, tokens/s", "ratio"), rows


def _tabulate_tasks(models: dict[str, Any]) -> Results:
    rows = []
    for model, scores in models.items():
        for score in scores:
            error = "" if score["error"] is None else f"{score['error']:.4f}"
            cells = [score["task"], score["metric"], f"{score['value']:.4f}", error, str(score["documents"])]
            rows.append([model, *cells])
    return ("model", "task", "metric", "value", "± standard error", "documents"), rows


def name_models(places: Sequence[Path]) -> list[str]:
    """Return short names for runs, given by folder or --save, or for exported folders; paths if two would be equal."""
    short = [run_folder(place.resolve()).name for place in places]
    return short if len(set(short)) == len(short) else [str(place) for place in places]


def name_data_sets(prefixes: Sequence[str]) -> list[str]:
    """Return short names for Megatron's data sets; with their folders if two would be equal."""
    short = [Path(prefix).name.removesuffix("_text_document") for prefix in prefixes]
    if len(set(short)) == len(short):
        return short
    folder = os.path.commonpath(map(os.path.abspath, prefixes))
    return [os.path.relpath(prefix, folder) for prefix in prefixes]
