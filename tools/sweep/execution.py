"""Run trainings as processes and show their progress; when stopped, they save a checkpoint first."""

import itertools
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from ..common.figure_reader import LOG
from ..common.training_process import end, start
from .plan import Launch, Run
from .progress import SweepDisplay, Work
from .run_log import read_outcome

KEPT, SHOWN = 300, 15  # last lines of the output; those of them that are shown if a run fails
_LAUNCHER = "torch/distributed/elastic"  # in the first line of torchrun's report, which does not have the cause
SECONDS_TO_DIE = 20


def train(launch: Launch, run: Run, display: SweepDisplay, work: Work, keep_open: IO[str]) -> str | None:
    """Train a run to its end.

    Args:
        launch: what all runs have in common.
        run: the run.
        display, work, keep_open: see `follow`.

    Returns:
        None if the run is finished, else what went wrong, with the end of its output.
    """
    environment = {"PYTHON": sys.executable} | os.environ | launch.environment(run, os.environ) | {"DRY_RUN": "0"}
    code, tail = follow(["bash", *launch.arguments(run)], environment, display, work, keep_open)
    log, outcome = launch.folder(run) / LOG, read_outcome(launch.folder(run))
    if outcome is not None and outcome.finished and code == 0:
        return None
    if code:
        reason = f"failed with exit code {code}"
    else:
        reason = f"ended at iteration {work.done} of {work.iterations}, without its final evaluation"
    where = f"\nThe whole log: {log}" if log.exists() else ""
    return f"{reason}. The end of its output:\n{cause(tail)}{where}"


def follow(
    command: Sequence[str],
    environment: Mapping[str, str],
    display: SweepDisplay,
    work: Work,
    keep_open: IO[str],
    log: IO[str] | None = None,
) -> tuple[int, Iterable[str]]:
    """Run a training to its end; KeyboardInterrupt stops it after a last checkpoint, a second one at once.

    Args:
        command: program and arguments.
        environment: all variables.
        display: shows the progress.
        work: the training in the display.
        keep_open: the folder's lock, which the process holds too.
        log: a file for its output.

    Returns:
        Its exit code and the end of its output.
    """
    display.begin(work)
    process = start(command, {**environment, "PYTHONUNBUFFERED": "1"}, keep_open)
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=KEPT)
    keep = [tail.append, *([log.write] if log else [])]
    try:
        display.follow(work, process.stdout, *keep)
        return process.wait(), tail
    except BaseException:
        rest = stop(process, display, work)
        if log:
            log.write(rest)
        raise


def cause(tail: Iterable[str]) -> str:
    """Return the last lines before torchrun's own."""
    lines = [*tail]
    own = list(itertools.takewhile(lambda line: _LAUNCHER not in line, lines)) or lines
    return "".join(own[-SHOWN:]).rstrip()


def stop(process: subprocess.Popen[str], display: SweepDisplay, work: Work) -> str:
    """Have the training save a checkpoint and end, without one at another Ctrl-C; return the rest of its output."""
    display.say(f"{work.title}: saving a checkpoint; a second Ctrl-C ends it at once, without one.")
    display.note(work, "saving")
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate()[0]
    except KeyboardInterrupt:
        rest = end(process, signal.SIGINT, SECONDS_TO_DIE)  # at which the launch script kills the training
        if rest is None:
            display.say(f"{work.title}: process {process.pid} did not end and was killed.")
        return rest or ""
