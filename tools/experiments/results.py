"""Read what runs have reached, and keep it in one file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.remoe.files.files import write_text

from ..console.errors import ToolError
from ..recipes.flops import training_flops
from ..runs.figure_reader import read_figures
from ..runs.run_figures import RunFigures
from .run import Run, run_from_fields

STAMP = "run.json"  # in a run's folder: the run, its fingerprint and its flags


@dataclass(frozen=True)
class Result:
    """The results of a run so far; None if its log does not have them (yet).

    Attributes:
        iterations: number of logged iterations.
        train_iters: number of iterations that the run was started for.
        loss: validation loss after the last iteration, in nats per token, or per byte of the text of a tiny run.
        losses: the same by validation set.
        first_near: the first logged iteration with S within 1 % of its target.
        settled: the first logged iteration from which S stays there.
        flip_rate, flip_count: of the routing decisions, median over the log's second half.
        experts_per_token: computed, mean over layers and over the steps since the log's second last line.
        inactive: number of experts of each layer that are inactive at the end.
        total_parameters: of the whole model.
        tokens_per_second: over all processes, median over the log's lines without the first, which has the warm-up.
        training_seconds: of the iterations only, from the log's time per iteration.
        flops: of the whole training, with the experts that were computed.
    """

    iterations: int
    train_iters: int
    loss: float | None = None
    losses: Mapping[str, float] | None = None
    first_near: int | None = None
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    experts_per_token: float | None = None
    inactive: Sequence[int] = ()
    total_parameters: int | None = None
    tokens_per_second: float | None = None
    training_seconds: float | None = None
    flops: float | None = None

    @property
    def is_finished(self) -> bool:
        """Return whether there is a validation loss after all iterations."""
        return self.loss is not None


Row = tuple[Run, Result | None]  # None: not started


def read_result(folder: Path, per_byte: Mapping[str, float] | None = None) -> Result | None:
    """Return the results of the run in a folder; None if it has not begun.

    Args:
        folder: of the run.
        per_byte: validation set → tokens of a byte; None if losses are per token.
    """
    try:
        figures = read_figures(folder)
    except ToolError:
        return None
    if not figures.args and not figures.last:
        return None
    train_iters = figures.whole("train_iters")
    losses = figures.final_losses(train_iters)
    names = figures.args.get("validation_set_names")
    wanted = names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else [""]
    unlogged = train_iters - figures.last if losses.keys() & {*wanted} else 0
    rates, seconds = figures.curve("tokens_per_second").values, figures.seconds
    rates = rates[1:] if len(rates) > 1 else rates
    experts = figures.experts_per_token(figures.curve("lm_loss").iterations[-2:])[-1:]
    return Result(
        iterations=figures.last + unlogged,
        train_iters=train_iters,
        loss=_mean_loss(figures, losses, wanted, per_byte or {}),
        losses={name: loss * (per_byte or {}).get(name, 1.0) for name, loss in losses.items()},
        first_near=figures.first_near,
        settled=figures.settled,
        flip_rate=_late_median(figures, "flip_rate"),
        flip_count=_late_median(figures, "flip_count"),
        experts_per_token=float(experts[0]) if len(experts) and np.isfinite(experts[0]) else figures.topk or None,
        inactive=figures.inactive_experts,
        total_parameters=figures.parameters,
        tokens_per_second=float(np.median(rates)) if len(rates) else None,
        training_seconds=float(seconds.sum()) if len(seconds) else None,
        flops=training_flops(figures),
    )


def _mean_loss(
    figures: RunFigures, losses: Mapping[str, float], wanted: Sequence[str], per_byte: Mapping[str, float]
) -> float | None:
    """Return the loss over all sets, weighted by their text; None if one has none yet."""
    if not losses.keys() >= {*wanted}:
        return None
    tokens = {name: figures.evaluations[name][-1].tokens for name in wanted}
    weights = {name: tokens[name] if all(tokens.values()) else 1 for name in wanted}
    sizes = sum(weight / per_byte.get(name, 1.0) for name, weight in weights.items())
    return sum(losses[name] * weight for name, weight in weights.items()) / sizes


def _late_median(figures: RunFigures, name: str) -> float | None:
    values = figures.curve(name).values
    return float(np.median(values[len(values) // 2 :])) if len(values) else None


def read_folder(output: Path, planned: Iterable[Run] = ()) -> list[Row]:
    """Return the runs in a folder of runs and the planned runs that are missing there, in the order of their names."""
    rows: dict[Run, Result | None] = dict.fromkeys(planned)
    for path in output.glob(f"*/{STAMP}"):
        stamp = json.loads(path.read_text(encoding="utf-8"))
        rows[run_from_fields(stamp["run"])] = read_result(path.parent, stamp.get("per_byte"))
    return sorted(rows.items(), key=lambda row: row[0].name)


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write runs and their results, one a line."""
    lines = (json.dumps({"run": asdict(run), "result": asdict(result) if result else None}) for run, result in rows)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_results(path: Path) -> list[Row]:
    """Read what `write_results` wrote.

    Raises:
        ToolError: the file is something else.
    """
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [(run_from_fields(each["run"]), each["result"] and Result(**each["result"])) for each in entries]
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise ToolError(f"{path}: no results of runs: {type(error).__name__}: {error}.") from error
