"""Run trainings one after another and show their progress: a bar on a terminal, a few plain lines elsewhere."""

import itertools
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..common.log_reader import read_log, seconds_per_iteration
from ..common.training_process import end, start
from ..common.units import duration, rate

PLAIN_LINES = 4  # per run, without a terminal
SECONDS_OF_RATE = 300  # of progress, from which the time left is estimated
KEPT, SHOWN = 300, 15  # last lines of the output; those of them that are shown if a run fails
SECONDS_TO_DIE = 20
_LAUNCHER = "torch/distributed/elastic"  # in the first line of torchrun's report, which does not have the cause
_RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")


@dataclass
class Work:
    """One training on the display; `cost` is its time relative to the other trainings."""

    name: str
    place: str  # "3/12"
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    next_line: float = 0.0  # iteration of the next plain line

    @property
    def title(self) -> str:
        """Return the training's place and name."""
        return f"{self.place} {self.name}"


class SweepDisplay:
    """Show the current training and the time left for all of them."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        self._progress = Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=SECONDS_OF_RATE
        )
        self._plain: Callable[[str], None] = (lambda _: None) if console.is_terminal else self.say
        self._bar = self._progress.add_task("", total=sum(work.cost for work in works), note="", visible=bool(works))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.update(self._bar, visible=False)
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)

    def note(self, work: Work, note: str) -> None:
        """Show what the training does."""
        self._progress.update(self._bar, description=work.title, note=note)

    def finish(self, work: Work, result: str) -> None:
        """Show that the training has ended, or had ended before."""
        self._move(work, work.iterations)
        self.say(f"{work.title}: {result}")

    def run(
        self, work: Work, command: Sequence[str], environment: Mapping[str, str], keep_open: IO[str],
        log: IO[str] | None = None,
    ) -> tuple[int, str]:  # fmt: skip
        """Run a training to its end; KeyboardInterrupt stops it after a last checkpoint, a second one at once.

        Args:
            work: the training in the display.
            command: program and arguments.
            environment: all variables.
            keep_open: the folder's lock, which the process holds too.
            log: a file for its output.

        Returns:
            Its exit code, and the last lines of its output before torchrun's own.
        """
        work.next_line = work.iterations / PLAIN_LINES
        self.note(work, "starting")
        self._plain(f"{work.title}: starting")
        process = start(command, {**environment, "PYTHONUNBUFFERED": "1"}, keep_open)
        assert process.stdout is not None
        tail: deque[str] = deque(maxlen=KEPT)
        write = log.write if log else len
        try:
            for line in process.stdout:
                tail.append(line)
                write(line)
                self._take(work, line)
            code = process.wait()
        except BaseException:
            write(self.stop(process, work))
            raise
        lines = [*tail]
        own = list(itertools.takewhile(lambda line: _LAUNCHER not in line, lines)) or lines
        return code, "".join(own[-SHOWN:]).rstrip()

    def stop(self, process: subprocess.Popen[str], work: Work) -> str:
        """Have the training save a checkpoint and end, without one at another Ctrl-C; return the rest of its output."""
        self.say(f"{work.title}: saving a checkpoint; a second Ctrl-C ends it at once, without one.")
        self.note(work, "saving")
        process.send_signal(signal.SIGTERM)
        try:
            return process.communicate()[0]
        except KeyboardInterrupt:
            rest = end(process, signal.SIGINT, SECONDS_TO_DIE)  # at which the launch script kills the training
            if rest is None:
                self.say(f"{work.title}: process {process.pid} did not end and was killed.")
            return rest or ""

    def _take(self, work: Work, line: str) -> None:
        """Show a line of Megatron's output."""
        if resumed := _RESUMED.search(line):
            before = self._move(work, int(resumed[1]), advance=False)
            self._progress.update(self._bar, total=(self._progress.tasks[self._bar].total or 0.0) - before)
            self._plain(f"{work.title}: goes on from iteration {work.done}")
        for iteration, fields in read_log(line).items():
            self._move(work, iteration)
            seconds = self._progress.tasks[self._bar].time_remaining
            left = "" if seconds is None else f"all: {duration(seconds)} left"
            speed = rate(work.tokens_per_iteration / max(seconds_per_iteration(fields), 1e-9))
            loss = f"loss {float(fields['lm loss']):.3f}" if "lm loss" in fields else ""
            note = "  ".join(filter(None, [f"{iteration}/{work.iterations}", loss, speed, left]))
            self.note(work, note)
            if iteration >= work.next_line:
                work.next_line = iteration + work.iterations / PLAIN_LINES
                self._plain(f"{work.title}: {note}")

    def _move(self, work: Work, iteration: int, advance: bool = True) -> float:
        """Set the iteration of a training; return the cost of those since the one before."""
        cost, work.done = work.cost * (iteration - work.done) / work.iterations, iteration
        self._progress.advance(self._bar, cost * advance)
        return cost
