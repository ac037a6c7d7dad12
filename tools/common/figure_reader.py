"""Read the figures of a run from its metrics.jsonl, or from the printed log if there is none (the authors' fork)."""

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ToolError
from .log_reader import read_parameters, read_printed
from .run_figures import Curve, Evaluation, RunFigures, whole_number

METRICS, LOG = "metrics.jsonl", "train.log"
LOADS = 512  # minimum number of lines whose expert load is kept; the maximum is twice that
NAMES, CURVES = 256, 4096  # maximum numbers of layers and of curves: a damaged file could hold any
NOT_FIGURES = frozenset({"kind", "time", "iteration", "guarded_layers", "tokens_per_expert"})
Record = Mapping[str, Any]


def find_figures(place: Path) -> Path:
    """Return the file that holds the figures of a run.

    Args:
        place: a run's folder, its --save, or a file.

    Raises:
        ToolError: there is none.
    """
    run = place.parent if place.name == "checkpoints" else place
    places = [place] if place.is_file() else [place / METRICS, place / "checkpoints" / METRICS, run / LOG]
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
    collector = _Collector(figures)
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            taken = collector.take_all(_records(file, figures))
        if not taken and figures.unread:
            raise ToolError(
                f"{path} is not the log of a run: no line has a kind and an iteration. "
                "Give a run's folder, its --save, or a log's file.",
                "REMOE-E502",
            )
    else:
        collector.take_all(read_printed(path))
    collector.finish()
    for log in (path,) if path.suffix != ".jsonl" else (path.parent / LOG, path.parent.parent / LOG):
        figures.parameters = figures.parameters or read_parameters(log, figures.args)
    return figures


def _records(lines: Iterable[str], figures: RunFigures) -> Iterator[Record]:
    """Parse lines; count complete lines without a record."""
    for line in lines:
        try:
            record = json.loads(line)
            if type(record["kind"]) is not str or whole_number(record["iteration"]) is None:
                raise TypeError
        except (ValueError, TypeError, LookupError, RecursionError):
            figures.unread += line.endswith("\n") and not line.isspace()
        else:
            yield record


class _Collector:
    """Turn records into curves."""

    def __init__(self, figures: RunFigures) -> None:
        self._figures = figures
        self._curves: dict[tuple[str, int], tuple[array, array]] = {}  # figure, and layer or 0: iterations and values
        self._loads: dict[int, Any] = {}
        self._newest_load: dict[int, Any] = {}
        self._stride, self._loaded = 1, 0
        self._evaluations: list[Record] = []

    def take_all(self, records: Iterable[Record]) -> int:
        """Take records in the order of the file and return their number."""
        taken = 0
        for record in records:
            taken += 1
            time: Any = record.get("time")
            if type(time) in (int, float) and 0 < time < 2**33:
                self._figures.written = float(time)
            if record["kind"] == "log":
                self._take_figures(record["iteration"], record)
                self._take_routing(record["iteration"], record)
            elif record["kind"] == "flips":
                flips = {f"flip_{name}": record.get(name) for name in ("rate", "count", "layer_rate")}
                self._take_figures(record["iteration"], flips)
            else:
                self._take_other(record)
        return taken

    def _take_figures(self, iteration: int, named: Record) -> None:
        """Add numbers, and numbers by layer, to the curves."""
        for name, value in named.items():
            if name in NOT_FIGURES:
                continue
            if type(value) is dict:
                for layer, of_layer in value.items():
                    if number := _number_of(layer):
                        self._add((name, number), iteration, of_layer)
            else:
                self._add((name, 0), iteration, value)

    def _add(self, key: tuple[str, int], iteration: int, value: Any) -> None:
        number = _number(value)
        if math.isfinite(number) and (key in self._curves or len(self._curves) < CURVES):
            iterations, values = self._curves.setdefault(key, (array("q"), array("d")))
            iterations.append(iteration)
            values.append(number)

    def _take_routing(self, iteration: int, record: Record) -> None:
        figures = self._figures
        figures.last = max(figures.last, iteration)
        figures.guarded.pop(iteration, None)
        guarded = record.get("guarded_layers")
        if type(guarded) is list and (layers := [each for each in map(whole_number, guarded[:NAMES]) if each]):
            figures.guarded[iteration] = layers
        load = record.get("tokens_per_expert")
        if type(load) is dict:
            self._newest_load = {iteration: load}
            if self._loaded % self._stride == 0:
                self._loads[iteration] = load
            self._loaded += 1
            if len(self._loads) >= 2 * LOADS:
                self._loads, self._stride = dict(islice(self._loads.items(), 0, None, 2)), 2 * self._stride

    def _take_other(self, record: Record) -> None:
        figures = self._figures
        if record["kind"] == "start":
            figures.args = record["args"] if type(record.get("args")) is dict else figures.args
            figures.parameters = whole_number(record.get("parameters")) or figures.parameters
        elif record["kind"] == "validation":
            self._evaluations.append(record)

    def finish(self) -> None:
        """Order the curves; if an iteration was logged twice, keep the newer line."""
        figures = self._figures
        for (name, layer), parts in sorted(self._curves.items()):
            curves: dict[Any, Curve] = figures.layers.setdefault(name, {}) if layer else figures.curves
            curves[layer or name] = _in_order(*parts)
        loads = {at: _load(held) for at, held in sorted((self._loads | self._newest_load).items())}
        figures.loads = {at: load for at, load in loads.items() if load}
        figures.guarded = dict(sorted(figures.guarded.items()))
        if "tokens_per_second" not in figures.curves and "seconds_per_iteration" in figures.curves:  # a printed log
            iterations, seconds = figures.curve("seconds_per_iteration")
            rates = figures.batches(iterations) * figures.whole("seq_length") / np.maximum(seconds, 1e-4)
            if (known := (rates > 0) & np.isfinite(rates)).any():
                figures.curves["tokens_per_second"] = Curve(iterations[known], rates[known])
        end, interval = figures.whole("train_iters"), figures.whole("eval_interval")
        on_the_way = 1 if interval and end % interval == 0 else 0  # evaluations at the last iteration but the final one
        at_the_end = Counter[str]()
        for record in self._evaluations:
            name, iteration, loss = str(record.get("set", "")), record["iteration"], _number(record.get("lm_loss"))
            at_the_end[name] += iteration == end
            final = record.get("final", iteration == end and at_the_end[name] > on_the_way)
            if math.isfinite(loss):
                found = Evaluation(iteration, loss, bool(final), whole_number(record.get("tokens")) or 0)
                figures.evaluations.setdefault(name, []).append(found)


def _in_order(held_iterations: array, held_values: array) -> Curve:
    iterations, values = np.array(held_iterations, np.int64), np.array(held_values)
    if (np.diff(iterations) > 0).all():
        return Curve(iterations, values)
    rising, newest = np.unique(iterations[::-1], return_index=True)
    return Curve(rising, values[::-1][newest])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _number_of(layer: Any) -> int | None:
    return int(layer) if isinstance(layer, str) and layer.isdecimal() and len(layer) < 9 else None


def _load(held: Mapping[str, Any]) -> dict[int, list[float]]:
    """Return layer → shares of its experts; layers that are not lists of numbers are left out."""
    found: dict[int, list[float]] = {}
    for layer, of in islice(held.items(), NAMES):
        shares = [_number(share) for share in of] if type(of) is list else []
        if (number := _number_of(layer)) and shares and all(map(math.isfinite, shares)):
            found[number] = shares
    return dict(sorted(found.items()))
