"""Run trainings one after another and show their progress: a bar on a terminal, otherwise a few plain lines."""

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

from .display import say
from .log_reader import MILLISECONDS, read_log
from .training_process import end, start
from .units import duration

PLAIN_LINES = 4  # per run, without a terminal
SECONDS_OF_RATE = 300  # of progress, from which the time left is estimated
KEPT, SHOWN = 300, 15  # last lines of the output, and how many of them to show if a run fails
SECONDS_TO_DIE = 20
_LAUNCHER = "torch/distributed/elastic"  # in the first line of torchrun's report, which never has the cause
_RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")


@dataclass
class ShownTraining:
    """One training on the display; `cost` is its time relative to the other trainings."""

    name: str
    place: str  # for example "3/12"
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    next_line: float = 0.0  # iteration of the next plain line

    @property
    def title(self) -> str:
        """Return the training's place and name."""
        return f"{self.place} {self.name}"


class TrainingDisplay:
    """Show the current training and the time left for all of them."""

    def __init__(self, console: Console, trainings: list[ShownTraining]) -> None:
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        self._progress = Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=SECONDS_OF_RATE
        )
        self._plain: Callable[[str], None] = (lambda _: None) if console.is_terminal else self.say
        self._bar = self._progress.add_task(
            "", total=sum(shown.cost for shown in trainings), note="", visible=bool(trainings)
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.update(self._bar, visible=False)
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        say(self._progress.console, f"  {line}")

    def note(self, shown: ShownTraining, note: str) -> None:
        """Show what the training does."""
        self._progress.update(self._bar, description=shown.title, note=note)

    def finish(self, shown: ShownTraining, result: str) -> None:
        """Show the result of a training that has ended."""
        self._skip_to(shown, shown.iterations)
        self.say(f"{shown.title}: {result}")

    def run(
        self, shown: ShownTraining, command: Sequence[str], environment: Mapping[str, str], keep_open: IO[str],
        log: IO[str] | None = None,
    ) -> tuple[int, str]:  # fmt: skip
        """Run a training to its end; KeyboardInterrupt stops it after a last checkpoint, a second one at once.

        The process also holds the lock of `keep_open`. Its output goes to `log` too.

        Returns:
            Its exit code, and the last lines of its output before torchrun's own.
        """
        shown.next_line = shown.iterations / PLAIN_LINES
        self.note(shown, "starting")
        self._plain(f"{shown.title}: starting")
        process = start(command, {**environment, "PYTHONUNBUFFERED": "1"}, keep_open)
        assert process.stdout is not None
        tail: deque[str] = deque(maxlen=KEPT)
        write = log.write if log else len
        try:
            for line in process.stdout:
                tail.append(line)
                write(line)
                self._take(shown, line)
            code = process.wait()
        except BaseException:
            write(self.stop(process, shown))
            raise
        lines = [*tail]
        own = list(itertools.takewhile(lambda line: _LAUNCHER not in line, lines)) or lines
        return code, "".join(own[-SHOWN:]).rstrip()

    def stop(self, process: subprocess.Popen[str], shown: ShownTraining) -> str:
        """Let the training save a checkpoint and end; another Ctrl-C ends it at once. Return the rest of its output."""
        self.say(f"{shown.title}: saving a checkpoint; a second Ctrl-C ends it at once, without one.")
        self.note(shown, "saving")
        process.send_signal(signal.SIGTERM)
        try:
            return process.communicate()[0]
        except KeyboardInterrupt:
            rest = end(process, signal.SIGINT, SECONDS_TO_DIE)  # makes the launch script kill the training
            if rest is None:
                self.say(f"{shown.title}: process {process.pid} did not end and was killed.")
            return rest or ""

    def _take(self, shown: ShownTraining, line: str) -> None:
        """Show a line of Megatron's output."""
        if resumed := _RESUMED.search(line):
            self._skip_to(shown, int(resumed[1]))
            self._plain(f"{shown.title}: goes on from iteration {shown.done}")
        for iteration, fields in read_log(line).items():
            self._progress.advance(self._bar, self._move(shown, iteration))
            seconds = self._progress.tasks[self._bar].time_remaining
            left = "" if seconds is None else f"all: {duration(seconds)} left"
            rate = 1000 * shown.tokens_per_iteration / max(float(fields[MILLISECONDS]), 1e-6)
            loss = f"loss {float(fields['lm loss']):.3f}" if "lm loss" in fields else ""
            speed = f"{rate / 1000:,.1f}k tokens/s"
            note = "  ".join(filter(None, [f"{iteration}/{shown.iterations}", loss, speed, left]))
            self.note(shown, note)
            if iteration >= shown.next_line:
                shown.next_line = iteration + shown.iterations / PLAIN_LINES
                self._plain(f"{shown.title}: {note}")

    def _skip_to(self, shown: ShownTraining, iteration: int) -> None:
        """Set the iteration of a training, and leave the iterations before it out of the time left."""
        if cost := self._move(shown, iteration):  # a new total forgets the rate
            self._progress.update(self._bar, total=(self._progress.tasks[self._bar].total or 0.0) - cost)

    def _move(self, shown: ShownTraining, iteration: int) -> float:
        """Set the iteration of a training. Return the cost of the iterations since the last call."""
        cost, shown.done = shown.cost * (iteration - shown.done) / shown.iterations, iteration
        return cost
