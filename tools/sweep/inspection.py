"""Find which runs are finished, unfinished, in Slurm's queue, or made with other settings."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.figure_reader import METRICS
from ..recipes.layout import RecipeError
from . import slurm
from .plan import Launch, Run
from .run_log import Outcome, has_checkpoint, is_finished, log_of, read_outcome
from .settings import Settings, check_evaluation, differences, started_with, would_start_with

NAMED = 5  # runs that a message names


@dataclass(frozen=True)
class Found:
    """A run, the settings that it would start with, and its state in the output folder."""

    run: Run
    settings: Settings
    outcome: Outcome | None
    job: str | None  # number of its queued or running Slurm job
    conflict: str  # differences to the settings of an earlier start; empty without any

    @property
    def finished(self) -> bool:
        """Return whether the run is finished."""
        return is_finished(self.outcome)

    @property
    def state(self) -> str:
        """Return the state as text."""
        if self.finished:
            return "finished"
        if self.job is not None:
            return f"queued or running as Slurm job {self.job}"
        if self.outcome is None:
            return "not started"
        return f"unfinished, at iteration {self.outcome.iterations} of {self.outcome.train_iters}"


def look(launch: Launch, runs: Sequence[Run], by_slurm: bool) -> list[Found]:
    """Inspect all runs.

    Args:
        launch: what all runs have in common.
        runs: to inspect.
        by_slurm: look for their jobs; the layout is checked where they start, on other machines than this.

    Raises:
        RecipeError: the scripts refuse their arguments, or a run has other settings than before.
        ToolError: squeue cannot be called.
    """
    wanted = {run: would_start_with(launch, run, by_slurm) for run in runs}
    jobs = slurm.queued() if by_slurm else {}  # before the outcomes: a job may just have finished
    found = []
    for run, settings in wanted.items():
        check_evaluation(settings)
        folder, outcome = launch.folder(run), read_outcome(launch.folder(run))
        job = None if is_finished(outcome) else jobs.get(str(folder))
        found.append(Found(run, settings, outcome, job, "" if job else _conflict(folder, settings, outcome)))
    refuse_conflicts(launch.output, found)
    return found


def refuse_conflicts(output: Path, found: Sequence[Found]) -> None:
    """Refuse runs that have other settings than before.

    Raises:
        RecipeError: names the runs, the differences, and the remedy.
    """
    lines = [f"  {each.run.name}: {each.conflict}" for each in found if each.conflict]
    if lines:
        more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
        head = f"{output} holds {len(lines)} of these runs with other settings:"
        remedy = "Give the same settings as then or another --output-dir; or remove these folders to train them again."
        raise RecipeError("\n".join([head, *lines[:NAMED], *more, remedy]))


def set_aside_old_log(folder: Path, now: Settings) -> None:
    """Rename the logs of an earlier start with other settings that left no checkpoint."""
    then = started_with(folder)
    if then is None or not differences(then, now):
        return
    for log in (log_of(folder), folder / "checkpoints" / METRICS):
        if log.exists():
            os.replace(log, log.with_name(f"{log.name}.old"))


def _conflict(folder: Path, now: Settings, outcome: Outcome | None) -> str:
    then = started_with(folder)
    if then is None:
        return "there is a checkpoint, but no command.sh to tell what it was trained with" * has_checkpoint(folder)
    return differences(then, now) if is_finished(outcome) or has_checkpoint(folder) else ""
