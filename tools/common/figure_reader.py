"""Read the figures of a run from its metrics.jsonl, or from the printed log if there is none (the authors' fork)."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import batched, chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ToolError
from .log_reader import read_parameters, read_printed
from .run_figures import Curve, Evaluation, RunFigures, whole_number

METRICS, LOG = "metrics.jsonl", "train.log"
LINES = 500  # read at a time
LOADS = 512  # minimum number of lines whose expert load is kept; the maximum is twice that
NAMES = 256  # maximum number of figures and of layers: a damaged file could hold any number
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
        self._parts: dict[str, list[Curve]] = {}
        self._of_layers: dict[str, dict[int, list[Curve]]] = {}
        self._loads: dict[int, Any] = {}
        self._newest_load: dict[int, Any] = {}
        self._stride, self._loaded = 1, 0
        self._evaluations: list[Record] = []

    def take_all(self, records: Iterable[Record]) -> int:
        """Take records in the order of the file and return their number."""
        taken = 0
        for chunk in batched(records, LINES):
            taken += len(chunk)
            logged, flips = ([record for record in chunk if record["kind"] == kind] for kind in ("log", "flips"))
            named = [{f"flip_{name}": record.get(name) for name in ("rate", "count", "layer_rate")} for record in flips]
            self._take_figures(flips, named)
            self._take_figures(logged, logged)
            for record in logged:
                self._take_routing(record["iteration"], record)
            if len(logged) < len(chunk):
                for record in chunk:
                    self._take_other(record)
            self._take_time(next((record["time"] for record in reversed(chunk) if "time" in record), None))
        return taken

    def _take_figures(self, records: Sequence[Record], named: Sequence[Record]) -> None:
        """Add the numbers of `named` to the curves, at the iterations of `records`."""
        iterations = np.array([record["iteration"] for record in records], np.int64)
        for name in islice(dict.fromkeys(chain.from_iterable(named)), NAMES):
            if name in NOT_FIGURES:
                continue
            values = [record.get(name) for record in named]
            if dict not in set(map(type, values)):
                _keep(self._parts, name, iterations, values)
                continue
            by_layer: list[Record] = [value if type(value) is dict else {} for value in values]
            parts = self._of_layers.setdefault(name, {}) if len(self._of_layers) < NAMES else {}
            for layer in islice(dict.fromkeys(chain.from_iterable(by_layer)), NAMES):
                if (number := _number_of(layer)) is not None:
                    _keep(parts, number, iterations, [value.get(layer) for value in by_layer])

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

    def _take_time(self, time: Any) -> None:
        if type(time) in (int, float) and 0 < time < 2**33:
            self._figures.written = float(time)

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
        figures.curves = {name: _join(parts) for name, parts in self._parts.items()}
        for name, layers in self._of_layers.items():
            figures.layers[name] = {layer: _join(parts) for layer, parts in sorted(layers.items())}
        loads = {at: _load(held) for at, held in sorted((self._loads | self._newest_load).items())}
        figures.loads = {at: load for at, load in loads.items() if load}
        figures.guarded = dict(sorted(figures.guarded.items()))
        if "tokens_per_second" not in figures.curves and "seconds_per_iteration" in figures.curves:  # a printed log
            iterations, seconds = figures.curve("seconds_per_iteration")
            rates = figures.batches(iterations) * figures.whole("seq_length") / np.maximum(seconds, 1e-4)
            if (known := rates > 0).any():
                figures.curves["tokens_per_second"] = Curve(iterations[known], rates[known])
        end, interval = figures.whole("train_iters"), figures.whole("eval_interval")
        on_the_way = 1 if interval and end % interval == 0 else 0  # evaluations at the last iteration but the final one
        at_the_end = Counter[str]()
        for record in self._evaluations:
            name, iteration, loss = str(record.get("set", "")), record["iteration"], _numbers([record.get("lm_loss")])
            at_the_end[name] += iteration == end
            final = record.get("final", iteration == end and at_the_end[name] > on_the_way)
            if np.isfinite(loss[0]):
                found = Evaluation(iteration, float(loss[0]), bool(final), whole_number(record.get("tokens")) or 0)
                figures.evaluations.setdefault(name, []).append(found)


def _keep[Name](
    parts: dict[Name, list[Curve]], name: Name, iterations: NDArray[np.int64], values: Sequence[Any]
) -> None:
    numbers = _numbers(values)
    finite = np.isfinite(numbers)
    if finite.any() and (name in parts or len(parts) < NAMES):
        parts.setdefault(name, []).append(Curve(iterations[finite], numbers[finite]))


def _join(parts: Sequence[Curve]) -> Curve:
    iterations, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if (np.diff(iterations) > 0).all():
        return Curve(iterations, values)
    rising, newest = np.unique(iterations[::-1], return_index=True)
    return Curve(rising, values[::-1][newest])


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return values as numbers; NaN for those that are not numbers."""
    try:
        numbers = np.array(values, np.float64)  # None becomes NaN
        if numbers.ndim == 1:
            return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    return np.array([_number(value) for value in values], np.float64)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _number_of(layer: Any) -> int | None:
    return int(layer) if isinstance(layer, str) and layer.isdecimal() and len(layer) < 9 else None


def _load(held: Mapping[str, Any]) -> dict[int, list[float]]:
    """Return layer → shares of its experts; layers that are not lists of numbers are left out."""
    shares = {_number_of(layer): _numbers(of) for layer, of in islice(held.items(), NAMES) if type(of) is list and of}
    return {
        layer: found.tolist() for layer, found in sorted(shares.items(), key=lambda one: one[0] or 0)
        if layer is not None and np.isfinite(found).all()
    }  # fmt: skip
