"""ReMoE's three stages in a run's log: how long each took, and what it cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..common.errors import ToolError
from ..common.flags import Settings
from ..common.run_figures import RunFigures
from ..recipes.flops import arguments_of, flops_per_expert, flops_per_sequence
from .run_log import read_run_figures
from .settings import started_with, whole

RISING = 0.1  # of the way from the first S to the target: the dense stage is over


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of a sequence with k experts per token, and of one more in every MoE layer."""

    sequence: float
    expert: float


@dataclass(frozen=True)
class Stage:
    """Iterations `first` to `last`: their time alone, their FLOPs, and active experts per token, averaged."""

    name: str
    first: int
    last: int
    hours: float
    flops: float
    experts: float


def stages(figures: RunFigures, flops: Flops) -> list[Stage]:
    """Return the dense stage, the way to the target and the steady stage, as far as the log has them.

    Other models have one stage, "all". A line of the log stands for the iterations since the line before.

    Args:
        figures: of the run.
        flops: of the run's model.
    """
    iterations, seconds = figures.curve("seconds_per_iteration")
    batches, target = figures.batches(iterations), figures.target
    steps = np.diff(iterations, prepend=0)
    if target is None:
        warmup, most = figures.whole("moe_warmup_steps"), figures.whole("moe_warmup_topk") or figures.topk
        warming = np.diff(iterations.clip(max=warmup), prepend=0) / np.maximum(steps, 1)
        experts = figures.topk + (most - figures.topk) * warming
    else:
        experts = figures.experts_per_token(iterations)
    known = np.isfinite(batches) & np.isfinite(experts)
    if not known.any():
        return []
    iterations, seconds, batches, experts = iterations[known], seconds[known], batches[known], experts[known]
    steps, last = steps[known], int(iterations[-1])
    ends = [("all", last)]
    if target is not None:
        sparsity = figures.at("sparsity", iterations)
        risen = sparsity - sparsity[0] > RISING * (target - sparsity[0])
        dense = int(iterations[risen.argmax() - 1]) if risen.any() else last  # the first line has not risen
        ends = [("dense", dense), ("way", figures.settled or last), ("steady", last)]
    of_target = 0.0 if target is None else figures.num_experts * (1 - target)
    more = experts - (figures.topk if target is None else of_target)
    cost = steps * batches * (flops.sequence + more * flops.expert)
    found, before = [], 0
    for name, end in ends:
        lines = (before < iterations) & (iterations <= end)
        if lines.any():
            hours, mean = (steps * seconds)[lines].sum() / 3600, (steps * experts)[lines].sum() / (end - before)
            found.append(Stage(name, before + 1, end, float(hours), float(cost[lines].sum()), float(mean)))
            before = end
    return found


def count_flops(folder: Path, figures: RunFigures) -> Flops:
    """Count the FLOPs of the run in `folder` by its command, and by its log for the size of its vocabulary.

    Raises:
        ToolError: the model has layers whose FLOPs are not counted.
    """
    args = arguments_of(started_with(folder) or {}, figures.whole("padded_vocab_size"))
    try:
        return Flops(flops_per_sequence(args), flops_per_expert(args))
    except ValueError as error:
        raise ToolError(f"{folder}: {error}.") from error


def read_stages(folder: Path) -> tuple[list[Stage], Flops]:
    """Those of the ReMoE in `folder`, and what its FLOPs were counted by.

    Raises:
        ToolError: there is no log of a ReMoE.
    """
    figures = read_run_figures(folder)
    if figures is not None and figures.target is not None and started_with(folder) is not None:
        flops = count_flops(folder, figures)
        if found := stages(figures, flops):
            return found, flops
    raise ToolError(f"{folder}: there is no command.sh with the log of a ReMoE that has begun to train.")


def matched_iterations(folder: Path) -> int:
    """The iterations of a top-k MoE that take the FLOPs of the ReMoE in `folder`, by that run's own counts."""
    return _matched(folder, *read_stages(folder))


def training_flops(folder: Path) -> float | None:
    """Return the FLOPs of the whole training in `folder`; None if its log or its command does not tell them.

    Exact where the log has the running sums of computed pairs, as each line since version 0.1 does.
    """
    figures, settings = read_run_figures(folder), started_with(folder)
    if figures is None or settings is None:
        return None
    flops = count_flops(folder, figures)
    found = stages(figures, flops)
    return _total(settings, found, flops) if found else None


def _total(settings: Settings, found: Sequence[Stage], flops: Flops) -> float:
    unlogged = whole(settings, "--train-iters") - found[-1].last  # at the target
    return sum(stage.flops for stage in found) + unlogged * whole(settings, "--global-batch-size") * flops.sequence


def _matched(folder: Path, found: Sequence[Stage], flops: Flops) -> int:
    settings = started_with(folder)
    assert settings is not None
    return round(_total(settings, found, flops) / (whole(settings, "--global-batch-size") * flops.sequence))


def show(console: Console, folders: Sequence[Path]) -> None:
    """Print the stages of runs."""
    table = Table(box=None, header_style="bold", padding=(0, 1), pad_edge=False)
    table.add_column("run, stage", no_wrap=True)
    for name in ("iterations", "experts per token", "hours", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for folder in folders:
        found, flops = read_stages(folder)
        table.add_row(folder.name)
        for each in found:
            numbers = (f"{each.first}-{each.last}", f"{each.experts:.2f}", f"{each.hours:.3f}", f"{each.flops:.3g}")
            table.add_row(f"  {each.name}", *numbers)
        table.add_row("  top-k MoE, FLOPs matched", f"{_matched(folder, found, flops)}")
    console.print(table)
