"""Read a run's figures from its metrics.jsonl, or from the printed log of the authors' fork."""

from array import array
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from megatron.remoe.training.run_log import FILE as METRICS
from megatron.remoe.training.run_log import read_run_log, whole_number

from ..console.errors import ToolError
from ..console.places import LOG, run_folder
from .log_reader import read_printed
from .run_figures import Curve, Evaluation, RunFigures

LOADS = 512  # minimum number of lines whose expert load is kept; the maximum is twice that
NAMES, CURVES = 256, 4096  # maximum numbers of layers and of curves: a damaged file could hold any
LARGEST_FIGURE = 1e308
FLIPS = {"rate": "flip_rate", "count": "flip_count", "layer_rate": "layer_flip_rate"}
NOT_FIGURES = frozenset({"kind", "time", "iteration", "parameters", "guarded_layers", "tokens_per_expert"})
Record = Mapping[str, Any]


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


def read_figures(place: Path) -> RunFigures:
    """Read the figures of a run; lines without a record are counted and skipped.

    Args:
        place: a run's folder, its --save, or a file: *.jsonl is read as metrics.jsonl, any other as printed output.

    Raises:
        ToolError: there is no such file, or it is not the log of a run.
        OSError: it cannot be read.
    """
    path = find_figures(place)
    figures = RunFigures(written=path.stat().st_mtime)
    collector, taken = _Collector(figures), 0

    def count(_: str) -> None:
        figures.unread += 1

    for record in read_run_log(path, count) if path.suffix == ".jsonl" else read_printed(path):
        collector.take(record)
        taken += 1
    is_new_log = place.is_dir() or path.name in (METRICS, LOG)
    if not taken and (figures.unread or not is_new_log):
        raise ToolError(
            f"{path} is not the log of a run: no line has a kind and an iteration. "
            "Give a run's folder, its --save, or a log's file.",
            "REMOE-E502",
        )
    collector.finish()
    return figures


class _Collector:
    """Turn records, in the order of the file, into curves."""

    def __init__(self, figures: RunFigures) -> None:
        self._figures = figures
        self._curves: dict[tuple[str, int], tuple[array, array]] = {}  # figure, and layer or 0: iterations and values
        self._loads: dict[int, Any] = {}
        self._newest_load: dict[int, Any] = {}
        self._stride, self._loaded = 1, 0

    def take(self, record: Record) -> None:
        """Add a record."""
        figures, iteration = self._figures, record["iteration"]
        if _is_figure(time := record.get("time")) and 0 < time < 2**33:
            figures.written = float(time)
        figures.parameters = whole_number(record.get("parameters")) or figures.parameters
        match record["kind"]:
            case "log":
                self._take_figures(iteration, record)
                self._take_routing(iteration, record)
            case "flips":
                self._take_figures(iteration, {title: record.get(name) for name, title in FLIPS.items()})
            case "start":
                figures.args = record["args"] if type(record.get("args")) is dict else figures.args
                figures.starts.append(iteration)
            case "validation" if _is_figure(loss := record.get("lm_loss")):
                tokens = whole_number(record.get("tokens")) or 0
                found = Evaluation(iteration, float(loss), record.get("final") is True, tokens)
                figures.evaluations.setdefault(str(record.get("set", "")), []).append(found)

    def _take_figures(self, iteration: int, named: Record) -> None:
        """Add numbers, and numbers by layer, to the curves."""
        for name, value in named.items():
            if name in NOT_FIGURES:
                continue
            for layer, of_layer in value.items() if type(value) is dict else (("0", value),):
                if layer.isdecimal() and len(layer) < 9 and _is_figure(of_layer):
                    key = (name, int(layer))
                    if key in self._curves or len(self._curves) < CURVES:
                        iterations, values = self._curves.setdefault(key, (array("q"), array("d")))
                        iterations.append(iteration)
                        values.append(of_layer)

    def _take_routing(self, iteration: int, record: Record) -> None:
        figures = self._figures
        figures.last = max(figures.last, iteration)
        figures.guarded.pop(iteration, None)
        guarded = record.get("guarded_layers")
        if type(guarded) is list and (layers := [each for each in map(whole_number, guarded[:NAMES]) if each]):
            figures.guarded[iteration] = layers
        if type(load := record.get("tokens_per_expert")) is dict:
            self._newest_load = {iteration: load}
            if self._loaded % self._stride == 0:
                self._loads[iteration] = load
            self._loaded += 1
            if len(self._loads) >= 2 * LOADS:
                self._loads, self._stride = dict(islice(self._loads.items(), 0, None, 2)), 2 * self._stride

    def finish(self) -> None:
        """Order the curves; if an iteration was logged twice, keep the newer line."""
        figures = self._figures
        for (name, layer), (iterations, values) in sorted(self._curves.items()):
            curves: dict[Any, Curve] = figures.layers.setdefault(name, {}) if layer else figures.curves
            rising, newest = np.unique(np.array(iterations)[::-1], return_index=True)
            curves[layer or name] = Curve(rising, np.array(values)[::-1][newest])
        loads = {at: _load(held) for at, held in sorted((self._loads | self._newest_load).items())}
        figures.loads = {at: load for at, load in loads.items() if load}
        figures.guarded = dict(sorted(figures.guarded.items()))
        if "tokens_per_second" not in figures.curves and "seconds_per_iteration" in figures.curves:  # a printed log
            at, seconds = figures.curve("seconds_per_iteration")
            rates = figures.batches(at) * figures.whole("seq_length") / np.maximum(seconds, 1e-4)
            if (known := (rates > 0) & np.isfinite(rates)).any():
                figures.curves["tokens_per_second"] = Curve(at[known], rates[known])


def _is_figure(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) <= LARGEST_FIGURE


def _load(held: Mapping[str, Any]) -> dict[int, list[float]]:
    """Return layer → shares of its experts; layers that are not lists of numbers are left out."""
    return {
        int(layer): shares
        for layer, shares in sorted(islice(held.items(), NAMES), key=lambda one: (len(one[0]), one[0]))
        if layer.isdecimal() and len(layer) < 9 and type(shares) is list and shares and all(map(_is_figure, shares))
    }
