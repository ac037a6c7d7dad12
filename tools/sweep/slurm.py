"""Submits runs as Slurm jobs, and finds those that are still queued or running."""

import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ToolError
from ..common.files import write_json
from ..common.places import ROOT
from .plan import Launch, Run
from .settings import Settings


@dataclass(frozen=True)
class Job:
    """A submitted run: Slurm's number, and its flags."""

    number: str
    settings: Settings


def sbatch_command(launch: Launch, run: Run, flags: Sequence[str]) -> list[str]:
    """Return the submission of a run; the user's sbatch `flags` override these and those in the file."""
    return [
        "sbatch",
        "--parsable",
        f"--job-name={run.name}",
        f"--output={launch.folder(run) / 'slurm-%j.out'}",
        f"--gpus-per-node={launch.gpus_per_node}",
        *flags,
        str(ROOT / "scripts" / "slurm" / "train.sbatch"),
        *launch.arguments(run),
    ]


def submit(launch: Launch, run: Run, flags: Sequence[str], settings: Settings) -> str:
    """Submit a run and note its job in the run's folder; return Slurm's number.

    Raises:
        ToolError: sbatch is missing or refuses.
    """
    launch.folder(run).mkdir(parents=True, exist_ok=True)
    command = sbatch_command(launch, run, flags)
    answer = _ask(command, os.environ | launch.environment(run, os.environ))
    number = answer.strip().splitlines()[-1].partition(";")[0] if answer.strip() else ""
    if not number.isdecimal():
        raise ToolError(f"sbatch answered {answer.strip()!r}, not a job's number, to\n  {shlex.join(command)}")
    write_json(_file(launch.folder(run)), {"job": number, "settings": settings})
    return number


def read_job(folder: Path) -> Job | None:
    """Return the job as which the run in `folder` was last submitted; None if it never was."""
    try:
        content = json.loads(_file(folder).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Job(content["job"], {flag: tuple(values) for flag, values in content["settings"].items()})


def alive(jobs: Iterable[Job]) -> set[str]:
    """Return the numbers of those jobs that squeue still lists: waiting, running or ending.

    Raises:
        ToolError: squeue cannot be asked.
    """
    if not (numbers := {job.number for job in jobs}):
        return set()
    answer = _ask(["squeue", "--me", "--noheader", "--format=%A"], dict(os.environ))
    return numbers & set(answer.split())


def _ask(command: list[str], environment: dict[str, str]) -> str:
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ToolError(f"{command[0]} was not found: run this on a machine of the Slurm cluster.") from None
    if result.returncode:
        raise ToolError(f"{command[0]} failed: {result.stderr.strip()}\n  {shlex.join(command)}")
    return result.stdout


def _file(folder: Path) -> Path:
    return folder / "slurm.json"
