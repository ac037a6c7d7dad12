"""Read the results of runs, and keep them in one file."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.remoe.files.files import write_text

from ..console.errors import ToolError
from ..recipes.flops import flops_per_sequence, training_flops
from ..runs.figure_reader import STAMP, read_figures
from ..runs.run_figures import RunFigures, weigh
from .run import Run, run_from_fields


@dataclass(frozen=True)
class Result:
    """The results of a run so far; None if its log does not have them (yet).

    Attributes:
        iterations: number of logged iterations.
        loss: validation loss after the last iteration, in nats per byte of text for a tiny run, else per token. A run
            with this loss is done.
        losses: the same by validation set.
        first_near: the first logged iteration with S within 1 % of its target.
        settled: the first logged iteration from which S stays there.
        flip_rate, flip_count: share, and number per token, of changed routing decisions (median); only in old files.
        experts_per_token: computed experts, mean over layers and over the steps since the log's second last line.
        inactive: number of each layer's experts that are inactive at the end.
        training_seconds: without evaluations and saves, from the log's time per iteration.
        flops: training FLOPs of the whole run, from the computed experts.
        step_flops: training FLOPs of a step with `experts_per_token`.
    """

    iterations: int
    loss: float | None = None
    losses: Mapping[str, float] | None = None
    first_near: int | None = None
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    experts_per_token: float | None = None
    inactive: Sequence[int] = ()
    training_seconds: float | None = None
    flops: float | None = None
    step_flops: float | None = None


Results = Mapping[Run, Result]  # of finished runs
Row = tuple[Run, Result | None]  # None: the run has no log yet


def read_result(folder: Path) -> Result | None:
    """Return the results of the run in a folder; None if it has not begun."""
    try:
        metrics = read_figures(folder)
    except ToolError:
        return None
    if not metrics.args and not metrics.last:
        return None
    train_iters = metrics.whole("train_iters")
    losses = {name: loss * metrics.per_byte.get(name, 1.0) for name, loss in metrics.final_losses(train_iters).items()}
    loss = _mean_loss(metrics, losses)
    experts = metrics.experts_per_token(metrics.curve("lm_loss").iterations[-2:])[-1:]
    experts_per_token = float(experts[0]) if len(experts) and np.isfinite(experts[0]) else metrics.topk or None
    flops, seconds = training_flops(metrics), metrics.seconds
    sequence = 0.0 if flops is None else flops_per_sequence(Namespace(**metrics.args), experts_per_token)
    return Result(
        iterations=metrics.last if loss is None else train_iters,  # the last steps may have no line
        loss=loss,
        losses=losses,
        first_near=metrics.first_near,
        settled=metrics.settled,
        experts_per_token=experts_per_token,
        inactive=metrics.inactive_experts,
        training_seconds=float(seconds.sum()) if len(seconds) else None,
        flops=flops,
        step_flops=sequence * metrics.whole("global_batch_size") or None,
    )


def _mean_loss(metrics: RunFigures, losses: Mapping[str, float]) -> float | None:
    """Return the mean loss of all sets, weighted by the size of their text; None until every set has a loss."""
    wanted = metrics.args.get("validation_set_names") or [""]
    if not losses.keys() >= {*wanted}:
        return None
    tokens = weigh([metrics.evaluations[name][-1] for name in wanted])
    weights = {name: number / metrics.per_byte.get(name, 1.0) for name, number in zip(wanted, tokens, strict=True)}
    return sum(losses[name] * weight for name, weight in weights.items()) / sum(weights.values())


def read_folder(output: Path) -> list[Row]:
    """Return the runs in a folder of runs with their results, in the order of their names."""
    rows: list[Row] = []
    for path in output.glob(f"*/{STAMP}"):
        stamp = json.loads(path.read_text(encoding="utf-8"))
        rows.append((run_from_fields(stamp["run"]), read_result(path.parent)))
    return sorted(rows, key=lambda row: row[0].name)


def finished(rows: Sequence[Row]) -> Results:
    """Return the results of the finished runs."""
    return {run: result for run, result in rows if result is not None and result.loss is not None}


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Write runs and their results to a JSON file, a line for each run."""
    lines = (json.dumps({"run": asdict(run), "result": asdict(result) if result else None}) for run, result in rows)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_results(path: Path) -> list[Row]:
    """Read a file of `write_results`.

    Raises:
        ToolError: the file cannot be read, or has a different format.
    """
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [(run_from_fields(each["run"]), each["result"] and Result(**each["result"])) for each in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ToolError(f"{path}: not a results.json of this version ({error})") from None
