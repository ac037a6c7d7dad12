"""Read a run's figures from its metrics.jsonl."""

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
from ..console.files import read_json
from .run_figures import Curve, Evaluation, RunFigures

# In the folder of a run of sweep, compare or quickstart: the run, tokens per byte, the text's files and what else its
# fingerprint depends on.
STAMP = "run.json"
NOT_FIGURES = frozenset({"kind", "time", "iteration", "parameters", "guarded_layers", "tokens_per_expert"})
Points = dict[tuple[str, int], tuple[array, array]]  # figure, and layer (0 for none) → iterations and values


def read_figures(place: Path, name: str = "") -> RunFigures:
    """Read the figures of a run. Count and skip damaged lines.

    Args:
        place: a run's folder, its --save, or its metrics.jsonl.
        name: the run's name in a comparison.

    Raises:
        ToolError: there is no such file, or it is not the log of a run.
        OSError: it cannot be read.
    """
    paths = [place] if place.is_file() else [place / METRICS, place / "checkpoints" / METRICS]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ToolError(f"{place}: no {METRICS}, nor in checkpoints. Give a run's folder or its --save.", "REMOE-E502")
    figures, has_records, unread = RunFigures(name=name), False, list[object]()
    curves: Points = defaultdict(lambda: (array("q"), array("d")))
    for record in read_run_log(path, unread.append):
        try:
            _add(figures, curves, record)
            has_records = True
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            unread.append(record)
    if not has_records and (unread or place.is_file()):
        raise ToolError(f"{path} is not the log of a run: no line has a kind and an iteration.", "REMOE-E502")
    _set_curves(figures, curves)
    figures.per_byte = _read_tokens_per_byte(path)
    if unread:
        figures.notes.append(f"{name}: cannot read {len(unread):,} of its log's lines; ignored them.")
    return figures


def _read_tokens_per_byte(log: Path) -> dict[str, float]:
    """Return validation set → tokens per byte from the stamp of the log's run; empty without one."""
    return next(filter(None, (read_json(folder / STAMP).get("per_byte") for folder in log.parents[:2])), {})


def _add(figures: RunFigures, curves: Points, record: Mapping[str, Any]) -> None:
    """Add a record of the log.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: a value has a wrong type or is missing.
    """
    iteration = record["iteration"]
    figures.parameters = record.get("parameters") or figures.parameters
    match record["kind"]:
        case "log":
            _add_numbers(curves, iteration, record)
            figures.last = max(figures.last, iteration)
            loads = record.get("tokens_per_expert", {})
            figures.loads[iteration] = {int(layer): np.array(loads[layer], np.float32) for layer in loads}
        case "start":
            figures.args = dict(record.get("args", figures.args))
            figures.starts.append(iteration)
        case "validation" if math.isfinite(loss := record.get("lm_loss", math.nan)):
            evaluation = Evaluation(iteration, loss, record.get("final") is True, record.get("tokens") or 0)
            figures.evaluations.setdefault(str(record.get("set", "")), []).append(evaluation)


def _add_numbers(curves: Points, iteration: int, named: Mapping[str, Any]) -> None:
    """Add numbers, and numbers by layer."""
    for name in named.keys() - NOT_FIGURES:
        by_layer = named[name] if isinstance(named[name], dict) else {0: named[name]}
        for layer, value in by_layer.items():
            if isinstance(value, int | float) and math.isfinite(value):
                iterations, values = curves[name, int(layer)]
                iterations.append(iteration)
                values.append(value)


def _set_curves(figures: RunFigures, points: Points) -> None:
    """Order the curves; if an iteration was logged twice, keep the newer line."""
    for (name, layer), (iterations, values) in sorted(points.items()):
        curves: dict[Any, Curve] = figures.layers.setdefault(name, {}) if layer else figures.curves
        rising, newest = np.unique(np.array(iterations)[::-1], return_index=True)
        curves[layer or name] = Curve(rising, np.array(values)[::-1][newest])
    figures.loads = {iteration: loads for iteration, loads in sorted(figures.loads.items()) if loads}
