"""Make the tables of the page, and its headline."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..console.display import duration
from ..recipes.flops import TrainingStage
from ..runs.run_figures import RunFigures

RECENT = 20  # newest lines of the log, whose median rate gives the time left


@dataclass(frozen=True)
class Table:
    """A table with its heading: titles of the columns, and rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def headline(runs: Sequence[RunFigures]) -> str:
    """Return the result in one line: the losses, best first, and their difference to the dense run's."""
    kind, losses = "validation loss", {run.name: run.validation_loss for run in runs}
    if None in losses.values():
        kind, losses = "training loss", {run.name: run.newest("lm_loss") for run in runs}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    if not known:
        return ""
    dense = [run.name for run in runs if run.routing == "dense" and run.name in known]
    per_byte = {run.name: run.validation_loss_per_byte for run in runs} if kind == "validation loss" else {}
    if not all(per_byte.values()):
        per_byte = {}
    parts = []
    for name, loss in sorted(known.items(), key=lambda item: item[1]):
        difference = f", {loss - known[dense[0]]:+.3f} vs. dense" if len(dense) == 1 and name != dense[0] else ""
        part = f"{name} {loss:.3f}" + (f" ({per_byte[name]:.3f})" if per_byte else "")
        parts.append(part + difference.replace("-", "−"))
    kind += ", nats per token" + " (per byte)" * bool(per_byte)
    return f"{'; '.join(parts)} ({kind})"


def summary(runs: Sequence[RunFigures]) -> Table:
    """Return a row for each figure that any run has, and a column for each run."""
    sets = dict.fromkeys(name for run in runs for name in run.evaluations)
    cells: dict[str, tuple[Callable[[RunFigures], float | None], str]] = {
        "last iteration": (lambda run: run.last, ","),
        "iterations": (lambda run: run.whole("train_iters") or None, ","),
        "training loss, nats per token": (lambda run: run.newest("lm_loss"), ".4f"),
        **{
            f"validation loss {name}".strip() + ", nats per token": (partial(_validation, name), ".4f") for name in sets
        },
        "sparsity S": (lambda run: run.newest("sparsity"), ".4f"),
        "target": (lambda run: run.target_sparsity, ".4f"),
        "first within 1 % of the target, at iteration": (lambda run: run.first_near, ","),
        "within 1 % from then on, at iteration": (lambda run: run.settled, ","),
        "λ": (lambda run: run.newest("l1_coefficient"), ".3e"),
        "parameters": (lambda run: run.parameters, ","),
        "tokens": (lambda run: (run.newest("consumed_samples") or 0) * run.whole("seq_length") or None, ",.0f"),
        "tokens per second": (lambda run: run.tokens_per_second, ",.0f"),
    }
    rows = [["time left", *map(_time_left, runs)]]
    for title, (find, form) in cells.items():
        rows.append([title, *("" if (value := find(run)) is None else format(value, form) for run in runs)])
    return Table("State", ["", *(run.name for run in runs)], [row for row in rows if any(row[1:])])


def _validation(name: str, run: RunFigures) -> float | None:
    return run.evaluations[name][-1].loss if name in run.evaluations else None


def _time_left(run: RunFigures) -> str:
    seconds = run.curve("seconds_per_iteration").values[-RECENT:]
    left = (run.whole("train_iters") - run.last) * float(np.median(seconds)) if len(seconds) else 0.0
    return duration(left) if 0 < left < math.inf else ""


def stages(by_run: Mapping[str, Sequence[TrainingStage]]) -> Table:
    """Return the training stages of each run, by its name, as in table 6 of the paper."""
    rows = [
        [
            run,
            {"way": "on the way"}.get(stage.name, stage.name),
            f"{stage.first:,}–{stage.last:,}",
            f"{stage.experts:.2f}" if stage.experts else "",
            duration(3600 * stage.hours),
            f"{stage.flops:.3g}",
        ]
        for run, parts in by_run.items()
        for stage in parts
    ]
    return Table("Stages", ["run", "stage", "iterations", "experts per token", "time", "FLOPs"], rows)
