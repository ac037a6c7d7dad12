"""Show the progress of trainings that run one after another: two bars on a terminal, a few plain lines elsewhere."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..common.log_reader import read_log, seconds_per_iteration
from ..common.units import duration, rate

PLAIN_LINES = 4  # per run, without a terminal
SECONDS_OF_RATE = 300  # of progress, from which the time left is estimated
_RESUMED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")
_EVALUATING = re.compile(r"^Evaluating iter (\d+/\d+)")


@dataclass
class Work:
    """One training on the display; `cost` is its time relative to the other trainings."""

    name: str
    place: str  # "3/12"
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations

    @property
    def title(self) -> str:
        """Return the training's place and name."""
        return f"{self.place} {self.name}"


class SweepDisplay:
    """Show the current training and all of them, with the time left."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        is_terminal = console.is_terminal
        self._progress = Progress(
            *columns, console=console, disable=not is_terminal, speed_estimate_period=SECONDS_OF_RATE
        )
        self._plain = (lambda _: None) if is_terminal else self.say
        self._next_line = 0.0
        self._current = self._progress.add_task("", note="", visible=False)
        self._all = self._progress.add_task("all", total=sum(work.cost for work in works), note="", visible=bool(works))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.update(self._current, visible=False)
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)

    def begin(self, work: Work) -> None:
        """Show that a training starts."""
        self._next_line = work.iterations / PLAIN_LINES
        self._progress.update(
            self._current, description=work.title, total=work.iterations, completed=0, visible=True, note="starting"
        )
        self._plain(f"{work.title}: starting")

    def follow(self, work: Work, lines: Iterable[str], *keep: Callable[[str], object]) -> None:
        """Show the progress that Megatron prints.

        Args:
            work: the training.
            lines: its output; the call returns when they end.
            keep: called with every line.
        """
        for line in lines:
            for take in keep:
                take(line)
            if resumed := _RESUMED.search(line):
                self._progress.update(self._all, total=self._total - self._move(work, int(resumed[1]), advance=False))
                self.note(work, f"goes on from iteration {work.done}")
                self._plain(f"{work.title}: goes on from iteration {work.done}")
            elif evaluating := _EVALUATING.match(line):
                self.note(work, f"evaluation {evaluating[1]}")
            for iteration, fields in read_log(line).items():
                self._iterate(work, iteration, fields)

    def note(self, work: Work, note: str) -> None:
        """Show what the training does besides iterations."""
        self._progress.update(self._current, completed=work.done, note=note)

    def finish(self, work: Work, result: str) -> None:
        """Show that the training has ended, or had ended before."""
        self._move(work, work.iterations)
        self._progress.update(self._current, visible=False)
        self.say(f"{work.title}: {result}")

    @property
    def _total(self) -> float:
        return self._progress.tasks[self._all].total or 0.0

    def _move(self, work: Work, iteration: int, advance: bool = True) -> float:
        """Set the iteration of a training; return the cost of those since the one before."""
        cost, work.done = work.cost * (iteration - work.done) / work.iterations, iteration
        self._progress.advance(self._all, cost * advance)
        return cost

    def _iterate(self, work: Work, iteration: int, fields: dict[str, str]) -> None:
        """Show a logged iteration."""
        self._move(work, iteration)
        seconds = self._progress.tasks[self._all].time_remaining
        left = "" if seconds is None else f"{duration(seconds)} left"
        speed = rate(work.tokens_per_iteration / max(seconds_per_iteration(fields), 1e-9))
        loss = f"loss {float(fields['lm loss']):.3f}" if "lm loss" in fields else ""
        note = "  ".join(filter(None, [f"{iteration}/{work.iterations}", loss, speed]))
        self.note(work, note)
        self._progress.update(self._all, note=f"{work.place}  {left}")
        if iteration >= self._next_line:
            self._next_line = iteration + work.iterations / PLAIN_LINES
            self._plain(f"{work.title}: {note}  {left}")
