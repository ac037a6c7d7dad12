"""What the console shows while the quickstart is at work: bars on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from ..common.bars import Bars
from ..common.units import duration, rate

PLAIN_LINES = 5  # per training, where there is no terminal


@contextmanager
def step(console: Console, name: str, doing: str) -> Iterator[list[str]]:
    """Show that a step is at work, and at its end one line: what was put into the yielded list, and the time."""
    result: list[str] = []
    start = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(f"{name:<8} {doing}", total=None)
        yield result
    console.print(f"  {name:<8} {' '.join(result)} [dim]{duration(time.monotonic() - start)}[/dim]", highlight=False)


@dataclass
class Work:
    """One training as the display sees it; `cost` is the time of an iteration against the other trainings'."""

    title: str
    iterations: int
    tokens_per_iteration: int
    cost: float
    evaluation: float  # iterations that take as long as the evaluation
    done: float = 0.0  # iterations, with the evaluation as so many more
    started: bool = False
    task: TaskID = field(default=TaskID(0))

    @property
    def left(self) -> float:
        """What is left to do, in the unit of `cost`."""
        return self.cost * max(0.0, self.iterations + self.evaluation - self.done)


class TrainingDisplay(Bars):
    """Shows trainings that run one after another, with the time left for each and for all."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        super().__init__(console, "  {task.description:<11}")
        self._works = works
        self._startup = 0.0
        self._begin = time.monotonic()
        self._next_line = 0.0
        for work in works:
            total = work.iterations + work.evaluation
            work.task = self._progress.add_task(work.title, total=total, note="[dim]waiting[/dim]")
        self._all = self._progress.add_task("all", total=sum(work.left for work in works), note="")

    def begin(self, work: Work, anew: bool) -> None:
        """A training's process starts; `anew` where an earlier result no longer holds."""
        work.started, self._begin, self._next_line = True, time.monotonic(), 0.0
        self._show(work, "starting", "")
        if anew:
            self._progress.console.print(f"  {work.title}: trained anew, since code, text or versions have changed")

    def resume(self, work: Work, iteration: int) -> None:
        """A training goes on from a checkpoint."""
        work.done = iteration
        self._show(work, f"goes on from iteration {iteration}", "")
        self._plain(f"{work.title}: goes on from iteration {iteration}")

    def iterate(self, work: Work, iteration: int, loss: float, seconds: float) -> None:
        """An iteration was logged: its mean loss and seconds per iteration since the line before."""
        if self._startup == 0.0:
            self._startup = time.monotonic() - self._begin
        work.done = iteration
        self._took(seconds / work.cost)
        note = f"{iteration}/{work.iterations}  loss {loss:.3f}  {rate(work.tokens_per_iteration / seconds)}"
        self._show(work, note, self._time_left(work))

    def evaluate(self, work: Work, share: float) -> None:
        """A share of the evaluation is done."""
        work.done = work.iterations + work.evaluation * share
        self._show(work, f"evaluation {share:.0%}", self._time_left(work))

    def finish(self, work: Work, result: str) -> None:
        """A training is over, or was so before."""
        work.done, work.started = work.iterations + work.evaluation, True
        self._progress.update(work.task, completed=work.done, note=result)
        self._update_all()
        self._plain(f"{work.title}: {result}")

    def _time_left(self, work: Work) -> str:
        left = self._time_for(work.left)
        return f"  {left}" if left else ""

    def _all_left(self) -> str:
        left = sum(work.left for work in self._works)
        return self._time_for(left, self._startup * sum(not work.started for work in self._works)) if left else ""

    def _show(self, work: Work, note: str, left: str) -> None:
        self._progress.update(work.task, completed=work.done, note=note + left)
        self._update_all()
        if left and work.done >= self._next_line:
            self._next_line = work.done + (work.iterations + work.evaluation) / PLAIN_LINES
            self._plain(f"{work.title}: {note}{left} (all {self._all_left()})")

    def _update_all(self) -> None:
        done = sum(work.cost * work.done for work in self._works)
        self._progress.update(self._all, completed=done, note=self._all_left())
        self._progress.update(self._all, total=done + sum(work.left for work in self._works))

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"  {line}", highlight=False, soft_wrap=True)
