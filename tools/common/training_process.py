"""A training as a process: started, followed by what it prints, and stopped."""

import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .log_reader import read_log

_RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")
_EVALUATING = re.compile(r"^Evaluating iter (\d+)/(\d+)")
_EVALUATED = re.compile(r"^ validation-\S+ loss at iteration (\d+) on validation set")


@dataclass(frozen=True)
class Resumed:
    """It goes on from a checkpoint."""

    iteration: int


@dataclass(frozen=True)
class Evaluating:
    """An evaluation is at its `batch` of `batches`."""

    batch: int
    batches: int


@dataclass(frozen=True)
class Evaluated:
    """One of several validation sets was evaluated for the last time, after this iteration."""

    iteration: int


@dataclass(frozen=True)
class Logged:
    """A line of the log; `fair` where its time is that of a warm process, or there will be no other line."""

    iteration: int
    fields: dict[str, str]
    fair: bool


def start(
    command: Sequence[str], environment: Mapping[str, str], keep_open: IO[str], folder: Path | None = None
) -> subprocess.Popen[str]:
    """Start a training whose output is to be read; Ctrl-C does not reach it.

    Args:
        command: its words.
        environment: all of it.
        keep_open: a lock's file, which the process holds too.
        folder: where it runs (default: here).
    """
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(keep_open.fileno(),),
    )


def events(
    lines: Iterable[str], iterations: int, *keep: Callable[[str], object]
) -> Iterator[Resumed | Evaluating | Evaluated | Logged]:
    """What a training's output tells.

    Args:
        lines: as they come.
        iterations: of the whole training.
        keep: called with every line first.
    """
    logged = 0
    for line in lines:
        for take in keep:
            take(line)
        if found := _RESUMED.search(line):
            yield Resumed(int(found[1]))
        elif found := _EVALUATING.match(line):
            yield Evaluating(int(found[1]), int(found[2]))
        elif found := _EVALUATED.match(line):
            yield Evaluated(int(found[1]))
        else:
            for iteration, fields in read_log(line).items():
                logged += 1
                yield Logged(iteration, fields, logged > 1 or iteration == iterations)


def end(process: subprocess.Popen[str], signal_number: signal.Signals, seconds: float) -> str | None:
    """Ask a process to end, and kill it if it does not within `seconds`.

    Returns:
        The rest of its output; None if it was killed.
    """
    process.send_signal(signal_number)
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
