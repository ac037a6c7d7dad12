"""Find which runs are finished, unfinished, in Slurm's queue, or made with other settings."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..common.figure_reader import METRICS
from ..recipes.layout import RecipeError
from . import slurm
from .plan import Launch, Run
from .run_log import Outcome, has_checkpoint, is_finished, log_of, read_outcome
from .settings import Settings, check_evaluation, differences, started_with, would_start_with

THREADS = 8  # scripts that run at once; each waits for the list of the machine's GPUs
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


def look(launch: Launch, runs: Sequence[Run], anywhere: bool) -> list[Found]:
    """Inspect all runs.

    Raises:
        RecipeError: the scripts refuse their arguments, or a run has other settings than before.
        ToolError: squeue cannot be called for the submitted jobs.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        wanted = dict(zip(runs, threads.map(lambda run: would_start_with(launch, run, anywhere), runs), strict=True))
    for settings in wanted.values():
        check_evaluation(settings)
    outcomes = {run: read_outcome(launch.folder(run)) for run in runs}
    jobs = {run: job for run in runs if (job := slurm.read_job(launch.folder(run))) and not is_finished(outcomes[run])}
    alive = slurm.alive(jobs.values())
    outcomes |= {run: read_outcome(launch.folder(run)) for run in jobs}  # some may have just finished
    found = []
    for run in runs:
        at_work = run in jobs and jobs[run].number in alive and not is_finished(outcomes[run])
        job = jobs[run] if at_work else None
        conflict = _conflict(launch.folder(run), wanted[run], outcomes[run], job)
        found.append(Found(run, wanted[run], outcomes[run], job.number if job else None, conflict))
    refuse_conflicts(launch.output, found)
    return found


def refuse_conflicts(output: Path, found: Sequence[Found]) -> None:
    """Refuse runs that have other settings than before.

    Raises:
        RecipeError: names the runs, the differences, and the remedy.
    """
    conflicts = {each.run: each.conflict for each in found if each.conflict}
    if not conflicts:
        return
    lines = [f"  {run.name}: {conflict}" for run, conflict in conflicts.items()]
    more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    raise RecipeError(
        "\n".join(
            [
                f"{output} holds {len(lines)} of these runs with other settings:",
                *lines[:NAMED],
                *more,
                "Give the same settings as then or another --output-dir; or remove these folders to train them again.",
            ]
        )
    )


def set_aside_old_log(folder: Path, now: Settings) -> None:
    """Rename the logs of an earlier start with other settings that left no checkpoint."""
    then = started_with(folder)
    if then is None or not differences(then, now):
        return
    for log in (log_of(folder), folder / "checkpoints" / METRICS):
        if log.exists():
            os.replace(log, log.with_name(f"{log.name}.old"))


def _conflict(folder: Path, now: Settings, outcome: Outcome | None, job: slurm.Job | None) -> str:
    if job is not None:
        told = differences(job.settings, now)
        return f"waits or runs as Slurm job {job.number} (scancel {job.number} ends it): {told}" if told else ""
    then = started_with(folder)
    if then is None:
        return "there is a checkpoint, but no command.sh to tell what it was trained with" * has_checkpoint(folder)
    return differences(then, now) if is_finished(outcome) or has_checkpoint(folder) else ""
