"""ReMoE's three stages in a run's log: how long each took, and what it cost."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..common.errors import ToolError
from ..common.log_reader import read_log, seconds_per_iteration
from ..recipes.flops import arguments_of, flops_per_expert, flops_per_sequence
from .run_log import Records, log_of, settled_at, target_sparsity
from .settings import started_with, whole

_PADDED = re.compile(r"> padded vocab \(size: \d+\) .*\(new size: (\d+)\)")
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


def dense_until(records: Records, target: float) -> int:
    """The last logged iteration before S has risen by a tenth of its way to the target."""
    last = 0
    start: float | None = None
    for iteration, fields in records.items():
        sparsity = float(fields["sparsity"])
        start = sparsity if start is None else start
        if sparsity - start > RISING * (target - start):
            break
        last = iteration
    return last


def stages(records: Records, target: float, num_experts: int, flops: Flops) -> list[Stage]:
    """The dense stage, the way to the target, and the steady stage, as far as the log has them.

    Args:
        records: iteration → fields, in order; each line's S stands for the iterations since the line before.
        target: of S.
        num_experts: after granularity.
        flops: of the run's model.
    """
    dense, settled = dense_until(records, target), settled_at(records, target)
    ends = [("dense", dense), ("way", settled if settled is not None else max(records)), ("steady", max(records))]
    found, before = [], 0
    for name, end in ends:
        lines = [iteration for iteration in records if before < iteration <= end]
        seconds = cost = experts = 0.0
        previous = before
        for iteration in lines:
            fields, steps = records[iteration], iteration - previous
            active = num_experts * (1 - float(fields["sparsity"]))
            more = active - num_experts * (1 - target)
            seconds += steps * seconds_per_iteration(fields)
            cost += steps * int(fields["global batch size"]) * (flops.sequence + more * flops.expert)
            experts += steps * active
            previous = iteration
        if lines:
            found.append(Stage(name, before + 1, end, seconds / 3600, cost, experts / (end - before)))
            before = end
    return found


def ask_for_flops(folder: Path) -> Flops:
    """Return the FLOPs of the run in `folder`, by its command and, for the size of its vocabulary, its log.

    Raises:
        ToolError: the model has layers whose FLOPs are not counted.
    """
    log = folder / "train.log"
    padded = _PADDED.search(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else None
    args = arguments_of(started_with(folder) or {}, int(padded[1]) if padded else 0)
    try:
        return Flops(flops_per_sequence(args), flops_per_expert(args))
    except ValueError as error:
        raise ToolError(f"{folder}: {error}.") from error


def read_stages(folder: Path) -> tuple[list[Stage], Flops]:
    """Those of the ReMoE in `folder`, and what its FLOPs were counted by.

    Raises:
        ToolError: there is no log of a ReMoE.
    """
    settings = started_with(folder)
    log = log_of(folder)
    records = read_log(log.read_text(encoding="utf-8", errors="replace")) if log.exists() else {}
    records = {iteration: fields for iteration, fields in sorted(records.items()) if "sparsity" in fields}
    if settings is None or not records:
        raise ToolError(f"{folder}: there is no command.sh with a train.log of a ReMoE that has begun to train.")
    target = target_sparsity(settings, records[max(records)])
    assert target is not None
    num_experts = whole(settings, "--num-experts") * (whole(settings, "--moe-granularity") or 1)
    flops = ask_for_flops(folder)
    return stages(records, target, num_experts, flops), flops


def matched_iterations(folder: Path) -> int:
    """The iterations of a top-k MoE that take the FLOPs of the ReMoE in `folder`, by that run's own counts."""
    return _matched(folder, *read_stages(folder))


def _matched(folder: Path, found: Sequence[Stage], flops: Flops) -> int:
    settings = started_with(folder)
    assert settings is not None
    ends, batch = found[-1].last, whole(settings, "--global-batch-size")
    unlogged = whole(settings, "--train-iters") - ends  # at the target
    return round(sum(stage.flops for stage in found) / (batch * flops.sequence)) + unlogged


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
