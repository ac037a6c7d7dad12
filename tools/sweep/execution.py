"""Runs a launch script as a process and shows its progress; when stopped, it saves a checkpoint first."""

import itertools
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from typing import IO

from ..common.training_process import end, start
from .plan import Launch, Run
from .progress import SweepDisplay, Work
from .run_log import is_finished, log_of, read_outcome

KEPT, SHOWN = 300, 15  # last lines of the output; those of them that are shown if a run fails
_LAUNCHER = "torch/distributed/elastic"  # in the first line of torchrun's report, which does not have the cause
SECONDS_TO_DIE = 20


def train(launch: Launch, run: Run, display: SweepDisplay, work: Work, keep_open: IO[str]) -> str | None:
    """Train a run to its end; KeyboardInterrupt stops it after a last checkpoint, a second one at once.

    Args:
        launch: what all runs have in common.
        run: the run.
        display: shows the progress.
        work: the run in the display.
        keep_open: the folder's lock, which the process holds too.

    Returns:
        None if the run is finished, else what went wrong, with the end of its output.
    """
    folder = launch.folder(run)
    environment = {"PYTHON": sys.executable} | os.environ | launch.environment(run, os.environ)
    environment |= {"PYTHONUNBUFFERED": "1", "DRY_RUN": "0"}
    display.begin(work)
    process = start(["bash", *launch.arguments(run)], environment, keep_open)
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=KEPT)
    try:
        display.follow(work, process.stdout, tail.append)
        code = process.wait()
    except BaseException:
        _stop(process, display, work)
        raise
    outcome = read_outcome(folder)
    if is_finished(outcome) and code == 0:
        return None
    if code:
        reason = f"failed with exit code {code}"
    else:
        reason = f"ended at iteration {work.done} of {work.iterations}, without its final evaluation"
    log = f"\nThe whole log: {log_of(folder)}" if log_of(folder).exists() else ""
    return f"{reason}. The end of its output:\n{_cause(tail)}{log}"


def _cause(tail: Iterable[str]) -> str:
    """Return the last lines before torchrun's own."""
    own = list(itertools.takewhile(lambda line: _LAUNCHER not in line, tail)) or list(tail)
    return "".join(own[-SHOWN:]).rstrip()


def _stop(process: subprocess.Popen[str], display: SweepDisplay, work: Work) -> None:
    """Have the run save a checkpoint and end; end it without one at another Ctrl-C."""
    display.say(f"{work.place} {work.name}: saving a checkpoint; a second Ctrl-C ends it at once, without one.")
    display.note(work, "saving")
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate()
    except KeyboardInterrupt:
        if end(process, signal.SIGINT, SECONDS_TO_DIE) is None:  # at which the launch script kills the training
            display.say(f"{work.place} {work.name}: process {process.pid} does not end.")
