"""Run trainings and show their progress: bars on a terminal, otherwise a few plain lines."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..console.display import say
from ..console.units import duration
from .log_reader import MILLISECONDS, RESUMED, read_log
from .training_process import Processes

PLAIN_LINES = 4  # per run, without a terminal
SECONDS_OF_RATE = 300  # the time left is estimated from the progress of these last seconds
KEPT, SHOWN = 300, 15  # last lines of the output, and how many of them to show if a run fails
_LAUNCHER = "torch/distributed/elastic"  # in the first line of torchrun's report, which never has the cause


@dataclass
class ShownTraining:
    """One training on the display; `cost` is its time relative to the other trainings."""

    name: str
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    next_line: float = 0.0  # iteration of the next plain line
    title: str = ""  # its place and name, as in "3/12 dense"


class TrainingDisplay:
    """Show the trainings that run, and the time left for all."""

    def __init__(self, console: Console, trainings: Sequence[ShownTraining], keep_open: IO[str]) -> None:
        """Show nothing yet.

        Args:
            console: to print to.
            trainings: all of them.
            keep_open: a file whose lock the trainings hold too.
        """
        for number, shown in enumerate(trainings, 1):
            shown.title = f"{number}/{len(trainings)} {shown.name}"
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        self._progress = Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=SECONDS_OF_RATE
        )
        self._plain: Callable[[str], None] = (lambda _: None) if console.is_terminal else self.say
        self._processes, self._lock = Processes(keep_open), Lock()
        add = partial(self._progress.add_task, note="", visible=False)
        self._bars = {shown.title: add(shown.title, total=shown.iterations) for shown in trainings}
        self._all = add("all", total=sum(shown.cost for shown in trainings))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.update(self._all, visible=False)
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        say(self._progress.console, f"  {line}")

    def finish(self, shown: ShownTraining, result: str) -> None:
        """Show the result of a training that has ended."""
        self._skip_to(shown, shown.iterations)
        self.say(f"{shown.title}: {result}")

    def run_all(self, jobs: Iterable[Callable[[], None]], at_once: int) -> None:
        """Call the jobs, so many at once; each calls `run`.

        KeyboardInterrupt, or an exception of a job, stops the trainings of the others after a last checkpoint.
        """
        with self._processes.threads(at_once, self.say) as threads:
            for job in as_completed([threads.submit(job) for job in jobs]):
                job.result()

    def run(
        self, shown: ShownTraining, command: Sequence[str], environment: Mapping[str, str], log: IO[str] | None = None
    ) -> tuple[int, str]:
        """Run a training to its end. Its output goes to `log` too.

        Returns:
            Its exit code, and the last lines of its output before torchrun's own.

        Raises:
            KeyboardInterrupt: all were stopped.
        """
        shown.next_line = shown.iterations / PLAIN_LINES
        bar = self._bars[shown.title]
        self._progress.update(bar, note="starting", visible=True)
        self._progress.update(self._all, visible=True)
        self._plain(f"{shown.title}: starting")
        tail: deque[str] = deque(maxlen=KEPT)
        write = log.write if log else len
        try:
            with self._processes.start(command, {**environment, "PYTHONUNBUFFERED": "1"}) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    tail.append(line)
                    write(line)
                    if note := self._take(shown, line):
                        self._progress.update(bar, completed=shown.done, note=note)
        finally:
            self._progress.update(bar, visible=False)
        lines = [*tail]
        own = list(itertools.takewhile(lambda line: _LAUNCHER not in line, lines)) or lines
        return process.returncode, "".join(own[-SHOWN:]).rstrip()

    def _take(self, shown: ShownTraining, line: str) -> str:
        """Take a line of Megatron's output. Return what the training does; "" if the line does not say."""
        if resumed := RESUMED.search(line):
            self._skip_to(shown, int(resumed[1]))
            self._plain(f"{shown.title}: goes on from iteration {shown.done}")
        note = ""
        for iteration, fields in read_log(line).items():
            self._progress.advance(self._all, self._move(shown, iteration))
            rate = 1000 * shown.tokens_per_iteration / max(float(fields[MILLISECONDS]), 1e-6)
            loss = f"loss {float(fields['lm loss']):.3f}" if "lm loss" in fields else ""
            speed = f"{rate / 1000:,.1f}k tokens/s"
            note = "  ".join(filter(None, [f"{iteration}/{shown.iterations}", loss, speed]))
            seconds = self._progress.tasks[self._all].time_remaining
            left = "" if seconds is None else f"{duration(seconds)} left"
            self._progress.update(self._all, note=left)
            if iteration >= min(shown.next_line, shown.iterations):
                shown.next_line = iteration + shown.iterations / PLAIN_LINES
                self._plain(f"{shown.title}: {note}" + (f"  all: {left}" if left else ""))
        return note

    def _skip_to(self, shown: ShownTraining, iteration: int) -> None:
        """Set the iteration of a training, and leave the iterations before it out of the time left."""
        if cost := self._move(shown, iteration):  # a new total forgets the rate
            with self._lock:
                self._progress.update(self._all, total=(self._progress.tasks[self._all].total or 0.0) - cost)

    def _move(self, shown: ShownTraining, iteration: int) -> float:
        """Set the iteration of a training. Return the cost of the iterations since the last call."""
        cost, shown.done = shown.cost * (iteration - shown.done) / shown.iterations, iteration
        return cost
