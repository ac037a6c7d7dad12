"""What the console shows during a sweep: the current run and all of them; a few plain lines without a terminal."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..common.units import duration, rate

PLAIN_LINES = 4  # per run, without a terminal


@dataclass
class Work:
    """One run on the display; `cost` is the time it takes, relative to the other runs."""

    name: str
    place: str  # "3/12"
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    over: bool = False

    @property
    def left(self) -> float:
        """What is left to do, in the unit of `cost`."""
        return 0.0 if self.over else self.cost * max(0, self.iterations - self.done) / self.iterations

    @property
    def title(self) -> str:
        """The run with its place."""
        return f"{self.place} {self.name}"


class SweepDisplay:
    """Shows runs that are trained one after another, with the time left for the current one and for all."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        self._console, self._works = console, works
        self._seconds_per_cost: float | None = None  # of the newest lines, the older the less
        self._next_line = 0.0
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._current = self._progress.add_task("", total=1, note="", visible=False)
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
        """Show that a run's process starts."""
        self._next_line = work.iterations / PLAIN_LINES
        self._progress.update(self._current, description=work.title, total=work.iterations, visible=True)
        self._show(work, "starting", plain=True)

    def resume(self, work: Work, iteration: int) -> None:
        """Show that the run goes on from a checkpoint."""
        work.done = iteration
        self._show(work, f"goes on from iteration {iteration}", plain=True)

    def iterate(self, work: Work, iteration: int, seconds: float) -> None:
        """Show a logged iteration; `seconds`: per iteration since the line before."""
        work.done = iteration
        cost, before = max(seconds, 1e-9) * work.iterations / work.cost, self._seconds_per_cost
        self._seconds_per_cost = cost if before is None else 0.7 * before + 0.3 * cost
        speed = rate(work.tokens_per_iteration / max(seconds, 1e-9))
        note = f"{iteration}/{work.iterations}  {speed}  {self._time_left([work])}"
        self._show(work, note)
        if iteration >= self._next_line:
            self._next_line = iteration + work.iterations / PLAIN_LINES
            self._plain(f"{work.title}: {note} (all {self._time_left(self._works)})")

    def note(self, work: Work, note: str) -> None:
        """Show what else the run is doing."""
        self._show(work, note)

    def finish(self, work: Work, result: str) -> None:
        """Show that the run is over."""
        work.over = True
        self._progress.update(self._current, visible=False)
        self._show(work, "")
        self.say(f"{work.title}: {result}")

    def _time_left(self, works: list[Work]) -> str:
        """The time for the iterations of runs; empty before it is known."""
        seconds = self._seconds_per_cost
        return "" if seconds is None else f"{duration(seconds * sum(work.left for work in works))} left"

    def _show(self, work: Work, note: str, plain: bool = False) -> None:
        self._progress.update(self._current, completed=work.done, note=note)
        done, over = sum(work.cost - work.left for work in self._works), sum(work.over for work in self._works)
        all_note = f"{over}/{len(self._works)}  {self._time_left(self._works)}"
        self._progress.update(self._all, completed=done, note=all_note)
        if plain:
            self._plain(f"{work.title}: {note}")

    def _plain(self, line: str) -> None:
        if not self._console.is_terminal:
            self.say(line)
