"""Train the runs of a list that are missing: as processes of this machine, or as Slurm jobs."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import IO

from rich.console import Console

from megatron.remoe.files.files import write_text

from ..console.display import duration, say
from ..console.errors import ToolError
from ..console.places import LOG, ROOT
from ..runs.training_display import ShownTraining, TrainingDisplay
from .jobs import SAVES, TRACKER, Grid, Job, check_conflicts, find_shorter, may_continue, prepare
from .run import Run

TRAINS = {"DRY_RUN": "0", "REHEARSE": "0"}  # in the environment of a launch script


def execute(console: Console, grid: Grid, jobs: Sequence[Job], processes: int, held: IO[str]) -> dict[str, int]:
    """Train the jobs that are not done, on this machine or as Slurm jobs.

    Args:
        console: shows their progress.
        grid: settings of all jobs.
        jobs: WSD runs that differ only in their steps run in turn, shortest first, and each continues the one before.
        processes: number of runs at once on this machine.
        held: a locked file; the runs keep the lock too.

    Returns:
        Unfinished runs, name → exit code; none with Slurm, which trains them later.

    Raises:
        RecipeError: a folder holds a different run.
        ToolError: Slurm is missing or refuses.
    """
    check_conflicts(jobs)
    if grid.sbatch_flags is not None:
        submit(console, grid, jobs)
        return {}
    failed: dict[str, int] = {}
    shown = {  # the time of a step grows with the number of experts
        job.folder: ShownTraining(
            job.folder.name, job.run.steps, job.step_tokens, job.run.steps * (1 + job.run.experts / 32)
        )
        for job in jobs
    }
    chains: dict[Run, list[Job]] = {}
    for job in jobs:
        chains.setdefault(replace(job.run, steps=0) if job.run.is_wsd else job.run, []).append(job)
    for chain in chains.values():
        chain.sort(key=lambda job: job.run.steps)
        for place, job in enumerate(chain):  # the time left does not include the steps of a shorter run
            if may_continue(job, grid) and job.loss is None and not job.has_checkpoint:
                shorter = chain[place - 1].run if place else find_shorter(job, grid)
                shown[job.folder].done = shorter.decay_start if shorter else 0
    with TrainingDisplay(console, [*shown.values()], held) as display:

        def train(chain: Sequence[Job]) -> None:
            for place, job in enumerate(chain):
                line = shown[job.folder]
                if (loss := job.loss) is not None:
                    display.finish(line, f"reused, validation loss {loss:.4f}")
                    continue
                prepare(job, grid)
                if (code := _train(job, line, display)) is not None:
                    failed.update((each.folder.name, code) for each in chain[place:])
                    return

        display.run_all([partial(train, chain) for chain in chains.values()], processes)
    return failed


def _train(job: Job, line: ShownTraining, display: TrainingDisplay) -> int | None:
    """Train a run to its end; return its exit code if it has no final loss."""
    began = time.monotonic()
    environment = {"PYTHON": sys.executable} | {**os.environ, **job.environment, **TRAINS}
    if job.run.is_tiny:
        with (job.folder / LOG).open("a", encoding="utf-8", buffering=1) as log:
            print(f"$ OMP_NUM_THREADS=1 {shlex.join(job.words)}", file=log)
            code, cause = display.run(line, job.words, environment, log)
    else:
        code, cause = display.run(line, job.words, environment)  # the launch script writes the log
    loss = job.loss
    if code == 0 and loss is not None:
        if job.run.is_wsd:  # longer runs continue from the start of the decay, and nothing needs the end
            shutil.rmtree(job.folder / SAVES / f"iter_{job.run.steps:07}", ignore_errors=True)
            write_text(job.folder / SAVES / TRACKER, str(job.run.decay_start))
        display.finish(line, f"validation loss {loss:.4f}, {duration(time.monotonic() - began)}")
        return None
    reason = f"ended at iteration {line.done} of {line.iterations}, without its final evaluation"
    reason = f"failed with exit code {code}" if code else reason
    log_file = job.folder / LOG
    where = f"\nThe whole log: {log_file}" if log_file.exists() else ""
    display.finish(line, f"{reason}. The end of its output:\n{cause}{where}\n")
    return code


def state(job: Job, queued: Mapping[str, str]) -> str:
    """Return the state of a run; `queued` maps folders to numbers of waiting or running Slurm jobs."""
    if job.loss is not None:
        return "finished"
    if number := queued.get(str(job.folder)):
        return f"queued or running as Slurm job {number}"
    result = job.result()
    return "not started" if result is None else f"unfinished, at iteration {result.iterations} of {job.run.steps}"


# ---------------------------------------------------------------- Slurm


def submit(console: Console, grid: Grid, jobs: Sequence[Job]) -> None:
    """Submit the runs that are neither done nor queued. A Slurm job has the name of its run's folder.

    Raises:
        ToolError: sbatch or squeue is missing or refuses.
    """
    queued = queued_jobs()  # before the results are read: a job can finish in between
    for job in jobs:
        if job.loss is not None or str(job.folder) in queued:
            say(console, f"  {job.folder.name}: {state(job, queued)}")
            continue
        prepare(job, grid)
        answer = _ask(sbatch_command(job, grid), {**os.environ, **job.environment, **TRAINS})
        number = answer.strip().rpartition("\n")[2].partition(";")[0]
        say(console, f"  {job.folder.name}: Slurm job {number}")


def sbatch_command(job: Job, grid: Grid) -> list[str]:
    """Return the command that submits a run. The user's sbatch flags override ours and those in train.sbatch."""
    options = ["--parsable", f"--job-name={job.folder}", f"--output={job.folder / 'slurm-%j.out'}"]
    options += [f"--gpus-per-node={grid.gpus_per_node}", *(grid.sbatch_flags or ())]
    return ["sbatch", *options, str(ROOT / "scripts" / "slurm" / "train.sbatch"), *job.words[1:]]


def queued_jobs() -> dict[str, str]:
    """Return folder of a run → number of its waiting, running or ending job, for the user's jobs.

    Raises:
        ToolError: squeue is missing or fails.
    """
    lines = _ask(["squeue", "--me", "--noheader", "--format=%A %j"], dict(os.environ)).splitlines()
    return {name: number for number, _, name in (line.strip().partition(" ") for line in lines)}


def _ask(command: Sequence[str], environment: Mapping[str, str]) -> str:
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ToolError(f"{command[0]} was not found: run this on a machine of the Slurm cluster.") from None
    if result.returncode:
        raise ToolError(f"{command[0]} failed: {result.stderr.strip()}\n  {shlex.join(command)}")
    return result.stdout
