"""Start a training as a process, parse what it prints, and stop it."""

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


@dataclass(frozen=True)
class Resumed:
    """The training continues from a checkpoint."""

    iteration: int


@dataclass(frozen=True)
class Evaluating:
    """An evaluation is at `batch` of `batches`."""

    batch: int
    batches: int


@dataclass(frozen=True)
class Logged:
    """A line of the log; `fair`: its time does not include the warm-up, or no other line will follow."""

    iteration: int
    fields: dict[str, str]
    fair: bool


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    keep_open: IO[str],
    folder: Path | None = None,
    output: IO[str] | int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start a training that Ctrl-C does not reach: `end` stops it.

    Args:
        command: program and arguments.
        environment: all variables.
        keep_open: the file of a lock, which the process holds too.
        folder: working directory (default: the current one).
        output: file for standard output and errors (default: a pipe).
    """
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=(keep_open.fileno(),),
    )


def events(
    lines: Iterable[str], iterations: int, *keep: Callable[[str], object]
) -> Iterator[Resumed | Evaluating | Logged]:
    """Yield the events in a training's output.

    Args:
        lines: of the output.
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
        else:
            for iteration, fields in read_log(line).items():
                logged += 1
                yield Logged(iteration, fields, logged > 1 or iteration == iterations)


def end(process: subprocess.Popen[str], signal_number: signal.Signals, seconds: float) -> str | None:
    """Ask a process to end, and kill it if it does not within `seconds`.

    Returns:
        The rest of its output, "" if that goes to a file; None if it was killed.
    """
    process.send_signal(signal_number)
    try:
        return process.communicate(timeout=seconds)[0] or ""
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()  # no effect after it has ended
        process.wait()
