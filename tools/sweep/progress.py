"""What the console shows during a sweep: the current run and all of them; a few plain lines where it is no terminal."""

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console

from ..common.bars import Bars
from ..common.units import rate

PLAIN_LINES = 4  # per run, where there is no terminal


@dataclass
class Work:
    """One run as the display sees it; `cost` is the time it takes against the other runs'."""

    name: str
    place: str  # "3/12"
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    started: bool = False
    over: bool = False

    @property
    def left(self) -> float:
        """What is left to do, in the unit of `cost`."""
        return 0.0 if self.over else self.cost * max(0, self.iterations - self.done) / self.iterations


class SweepDisplay(Bars):
    """Shows runs that are trained one after another, with the time left for the current one and for all."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        super().__init__(console, "  {task.description}")
        self._works = works
        self._begin, self._iterating = 0.0, 0.0  # seconds: when the run began, and what its iterations took
        self._beside: float | None = None  # seconds of the last run beside its iterations
        self._next_line = 0.0
        self._current = self._progress.add_task("", total=1, note="", visible=False)
        self._all = self._progress.add_task("all", total=sum(work.cost for work in works), note="", visible=bool(works))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.update(self._current, visible=False)
        super().__exit__(kind, error, at)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)

    def begin(self, work: Work) -> None:
        """A run's process starts."""
        work.started = True
        self._begin, self._iterating = time.monotonic(), 0.0
        self._next_line = work.iterations / PLAIN_LINES
        self._progress.update(
            self._current, description=f"{work.place} {work.name}", total=work.iterations, completed=0, visible=True
        )
        self._show(work, "starting")
        self._plain(f"{work.place} {work.name}: starting")

    def resume(self, work: Work, iteration: int) -> None:
        """The run goes on from a checkpoint."""
        work.done = iteration
        self._show(work, f"goes on from iteration {iteration}")
        self._plain(f"{work.place} {work.name}: goes on from iteration {iteration}")

    def iterate(self, work: Work, iteration: int, seconds: float) -> None:
        """An iteration was logged, with the mean seconds per iteration since the line before."""
        self._iterating += seconds * (iteration - work.done)
        work.done = iteration
        self._took(seconds * work.iterations / work.cost)
        speed = rate(work.tokens_per_iteration / seconds)
        note = f"{iteration}/{work.iterations}  {speed}  {self._time_for(work.left)}"
        self._show(work, note)
        if iteration >= self._next_line:
            self._next_line = iteration + work.iterations / PLAIN_LINES
            self._plain(f"{work.place} {work.name}: {note} (all {self._all_time()})")

    def note(self, work: Work, note: str) -> None:
        """Something else is going on in the run."""
        self._show(work, note)

    def finish(self, work: Work, result: str) -> None:
        """The run is over."""
        work.over = True
        if self._iterating:
            self._beside = max(0.0, time.monotonic() - self._begin - self._iterating)
        self._progress.update(self._current, visible=False)
        self._show(work, "")
        self.say(f"{work.place} {work.name}: {result}")

    def _left(self) -> float:
        return sum(work.left for work in self._works)

    def _all_time(self) -> str:
        return self._time_for(self._left(), sum(not work.started for work in self._works) * (self._beside or 0.0))

    def _show(self, work: Work, note: str) -> None:
        self._progress.update(self._current, completed=work.done, note=note)
        total, over = sum(work.cost for work in self._works), sum(work.over for work in self._works)
        all_note = f"{over}/{len(self._works)}  {self._all_time()}"
        self._progress.update(self._all, completed=total - self._left(), note=all_note)

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self.say(line)
