"""Submit runs as Slurm jobs. A job has the name of the run's folder, by which it is found again."""

import os
import shlex
import subprocess
from collections.abc import Sequence

from ...console.errors import ToolError
from ...console.places import ROOT
from .plan import Launch, Run


def sbatch_command(launch: Launch, run: Run, flags: Sequence[str]) -> list[str]:
    """Return the submission of a run; the user's sbatch `flags` override these and those in the file."""
    folder = launch.folder(run)
    own = ["--parsable", f"--job-name={folder}", f"--output={folder / 'slurm-%j.out'}"]
    own += [f"--gpus-per-node={launch.gpus_per_node}"]
    return ["sbatch", *own, *flags, str(ROOT / "scripts" / "slurm" / "train.sbatch"), *launch.arguments(run)]


def submit(launch: Launch, run: Run, flags: Sequence[str]) -> str:
    """Submit a run and return the job's number.

    Raises:
        ToolError: sbatch is missing or refuses.
    """
    launch.folder(run).mkdir(parents=True, exist_ok=True)
    answer = _ask(sbatch_command(launch, run, flags), os.environ | launch.environment(run, os.environ))
    return answer.strip().rpartition("\n")[2].partition(";")[0]


def queued() -> dict[str, str]:
    """Return folder of a run → number of its waiting, running or ending job, for the user's jobs.

    Raises:
        ToolError: squeue is missing or fails.
    """
    lines = _ask(["squeue", "--me", "--noheader", "--format=%A %j"], dict(os.environ)).splitlines()
    return {name: number for number, _, name in (line.strip().partition(" ") for line in lines)}


def _ask(command: list[str], environment: dict[str, str]) -> str:
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise ToolError(f"{command[0]} was not found: run this on a machine of the Slurm cluster.") from None
    if result.returncode:
        raise ToolError(f"{command[0]} failed: {result.stderr.strip()}\n  {shlex.join(command)}")
    return result.stdout
