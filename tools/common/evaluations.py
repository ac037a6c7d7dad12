"""Make tables of the results of tools/evaluate."""

import math
from collections.abc import Iterator
from typing import Any

from . import short_names

TITLES = {
    "text": ("model", "data set", "K", "loss", "perplexity", "experts per token: mean, 99 %, largest"),
    "speed": ("model", "reading, tokens/s", "ratio", "writing, tokens/s", "ratio"),
    "tasks": ("model", "task", "metric", "value", "± standard error", "documents"),
}


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield a key of `TITLES` and the table's rows for each kind of result.

    Args:
        results: content of the file of `--output`.
    """
    for kind, rows in (("text", _on_text), ("speed", _on_speed), ("tasks", _on_tasks)):
        if kind in results:
            yield kind, [*rows(results[kind])]


def _on_text(models: dict[str, Any]) -> Iterator[list[str]]:
    for model, sets in short_names.by_model(models):
        for data_set, bounds in zip(short_names.of_data_sets([*sets]), sets.values(), strict=True):
            for bound, one in bounds.items():
                layers = (f"{of['mean']:.2f}, {of['percentile_99']}, {of['largest']}" for of in one["experts"].values())
                loss = one["loss"]
                yield [model, data_set, bound, f"{loss:.5f}", f"{math.exp(loss):.4f}", "; ".join(layers)]


def _on_speed(models: dict[str, Any]) -> Iterator[list[str]]:
    first = next(iter(models.values()))
    for model, one in short_names.by_model(models):
        pairs = ((f"{one[what]:,.0f}", f"{one[what] / first[what]:.2f}") for what in ("prefill", "decode"))
        yield [model, *(cell for pair in pairs for cell in pair)]


def _on_tasks(models: dict[str, Any]) -> Iterator[list[str]]:
    for model, scores in short_names.by_model(models):
        for one in scores:
            value, error = f"{one['value']:.4f}", f"{one['error']:.4f}"
            yield [model, one["task"], one["metric"], value, error, str(one["documents"])]
