"""Read a run's figures from its metrics.jsonl, or from the printed log of the authors' fork."""

import math
from array import array
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron.remoe.training.run_log import FILE as METRICS
from megatron.remoe.training.run_log import read_run_log

from ..console.errors import ToolError
from ..console.places import LOG, run_folder
from .log_reader import read_printed
from .run_figures import Curve, Evaluation, RunFigures

FLIPS = {"rate": "flip_rate", "count": "flip_count", "layer_rate": "layer_flip_rate"}
NOT_FIGURES = frozenset({"kind", "time", "iteration", "parameters", "guarded_layers", "tokens_per_expert"})


def find_figures(place: Path) -> Path:
    """Return the file that holds the figures of a run, by its folder, its --save, or the file itself.

    Raises:
        ToolError: there is none.
    """
    places = [place / METRICS, place / "checkpoints" / METRICS, run_folder(place) / LOG]
    places = [place] if place.is_file() else places
    for path in places:
        if path.is_file():
            return path
    raise ToolError(
        f"{place}: no run: none of {METRICS}, checkpoints/{METRICS}, {LOG}. "
        "Give a run's folder, its --save, or a log's file.",
        "REMOE-E502",
    )


def read_figures(place: Path, name: str = "") -> RunFigures:
    """Read the figures of a run; lines that are no record, or an odd one, are counted and skipped.

    Args:
        place: a run's folder, its --save, or a file: *.jsonl is read as metrics.jsonl, any other as printed output.
        name: of the run, in a comparison.

    Raises:
        ToolError: there is no such file, or it is not the log of a run.
        OSError: it cannot be read.
    """
    path = find_figures(place)
    figures = RunFigures(name=name)
    collector, has_records = _Collector(figures), False

    def count(_: str) -> None:
        figures.unread += 1

    for record in read_run_log(path, count) if path.suffix == ".jsonl" else read_printed(path):
        try:
            collector.add(record)
            has_records = True
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            figures.unread += 1
    if not has_records and (figures.unread or place.is_file()):
        raise ToolError(
            f"{path} is not the log of a run: no line has a kind and an iteration. "
            "Give a run's folder, its --save, or a log's file.",
            "REMOE-E502",
        )
    collector.finish()
    if figures.unread:
        figures.notes.append(f"{name}: {figures.unread:,} lines of its log cannot be read and are left out.")
    return figures


class _Collector:
    """Turn records, in the order of the file, into curves."""

    def __init__(self, figures: RunFigures) -> None:
        self._figures = figures
        # figure, and layer or 0 → iterations and values
        self._curves: dict[tuple[str, int], tuple[array, array]] = defaultdict(lambda: (array("q"), array("d")))

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record.

        Raises:
            ArithmeticError, AttributeError, LookupError, TypeError, ValueError: a value has another type or is missing.
        """
        figures, iteration = self._figures, record["iteration"]
        figures.parameters = record.get("parameters") or figures.parameters
        match record["kind"]:
            case "log":
                self._add_numbers(iteration, record)
                figures.last = max(figures.last, iteration)
                loads = record.get("tokens_per_expert", {})
                figures.loads[iteration] = {int(layer): np.array(loads[layer], np.float32) for layer in loads}
            case "flips":
                self._add_numbers(iteration, {title: record.get(name) for name, title in FLIPS.items()})
            case "start":
                figures.args = dict(record.get("args", figures.args))
                figures.starts.append(iteration)
            case "validation" if math.isfinite(loss := record["lm_loss"]):
                evaluation = Evaluation(iteration, loss, record.get("final") is True, record.get("tokens") or 0)
                figures.evaluations.setdefault(str(record.get("set", "")), []).append(evaluation)

    def _add_numbers(self, iteration: int, named: Mapping[str, Any]) -> None:
        """Add numbers, and numbers by layer, to the curves."""
        for name in named.keys() - NOT_FIGURES:
            by_layer = named[name] if isinstance(named[name], dict) else {0: named[name]}
            for layer, value in by_layer.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    iterations, values = self._curves[name, int(layer)]
                    iterations.append(iteration)
                    values.append(value)

    def finish(self) -> None:
        """Order the curves; if an iteration was logged twice, keep the newer line."""
        figures = self._figures
        for (name, layer), (iterations, values) in sorted(self._curves.items()):
            curves: dict[Any, Curve] = figures.layers.setdefault(name, {}) if layer else figures.curves
            rising, newest = np.unique(np.array(iterations)[::-1], return_index=True)
            curves[layer or name] = Curve(rising, np.array(values)[::-1][newest])
        figures.loads = {at: loads for at, loads in sorted(figures.loads.items()) if loads}
        if "tokens_per_second" not in figures.curves and "seconds_per_iteration" in figures.curves:  # a printed log
            at, seconds = figures.curve("seconds_per_iteration")
            rates = figures.batches(at) * figures.whole("seq_length") / np.maximum(seconds, 1e-4)
            if (known := (rates > 0) & np.isfinite(rates)).any():
                figures.curves["tokens_per_second"] = Curve(at[known], rates[known])
