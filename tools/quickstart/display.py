"""Progress of the quickstart on the console: bars on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..common.units import duration, rate
from .report import Run

PLAIN_LINES = 5  # per training, without a terminal


@contextmanager
def step(console: Console, name: str, doing: str) -> Iterator[list[str]]:
    """Show that a step is at work, and at its end one line: the strings in the yielded list, and the time."""
    result: list[str] = []
    start = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(f"{name:<8} {doing}", total=None)
        yield result
    console.print(f"  {name:<8} {' '.join(result)} [dim]{duration(time.monotonic() - start)}[/dim]", highlight=False)


@dataclass
class Work:
    """One training on the display.

    Attributes:
        title: its name.
        iterations: optimizer steps.
        cost: time of an iteration, relative to the other trainings.
        evaluation: iterations that take as long as the evaluation.
        sets: number of sets that are evaluated.
    """

    title: str
    iterations: int
    cost: float
    evaluation: float
    sets: int
    task: TaskID = field(default=TaskID(0))

    @property
    def total(self) -> float:
        """All of the work, in the unit of `cost`."""
        return self.cost * (self.iterations + self.evaluation)


class TrainingDisplay:
    """Shows trainings that run one after another, with the time left for all of them."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        self._console = console
        columns = (TextColumn("  {task.description:<11}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        for work in works:
            work.task = self._progress.add_task(work.title, total=work.total, note="[dim]waiting[/dim]")
        self._all = self._progress.add_task("all", total=sum(work.total for work in works), note="")
        self._before = 0.0  # work of the trainings that are over
        self._said = -1.0  # share of a training at its last plain line

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, work: Work, anew: bool) -> None:
        """Show that a training's process starts; `anew` if an earlier result no longer holds."""
        self._said = -1.0
        self._update(work, 0.0, "starting")
        if anew:
            self._progress.console.print(f"  {work.title}: trained anew, because code, text or versions have changed")

    def show(self, work: Work, run: Run) -> None:
        """Show how far a training is; `run` has what its process has logged."""
        if not run.lines:
            return
        if run.start and self._said < 0:
            self._plain(f"{work.title}: goes on from iteration {run.start}")
        last, share = run.lines[-1], len(run.losses) / work.sets
        if last["iteration"] == work.iterations:
            note = f"evaluation {share:.0%}"
        else:
            loss = f"loss {last['lm_loss']:.3f}" if "lm_loss" in last else "loss not finite"
            note = f"{last['iteration']}/{work.iterations}  {loss}  {rate(last['tokens_per_second'])}"
        done = work.cost * (last["iteration"] + work.evaluation * share)
        self._update(work, done, note)
        if done / work.total >= self._said + 1 / PLAIN_LINES:
            self._said = done / work.total
            left = self._progress.tasks[self._all].time_remaining
            self._plain(f"{work.title}: {note}" + (f"  (all: {duration(left)} left)" if left else ""))

    def finish(self, work: Work, result: str) -> None:
        """Show that a training is over, or was so before."""
        self._update(work, work.total, result)
        self._before += work.total
        self._plain(f"{work.title}: {result}")

    def _update(self, work: Work, done: float, note: str) -> None:
        self._progress.update(work.task, completed=done, note=note)
        self._progress.update(self._all, completed=self._before + done)

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"  {line}", highlight=False, soft_wrap=True)
