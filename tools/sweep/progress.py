"""Show the progress of trainings that run one after another: two bars on a terminal, a few plain lines elsewhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..common.log_reader import seconds_per_iteration
from ..common.training_process import Evaluating, Logged, Resumed, events
from ..common.units import duration, rate

PLAIN_LINES = 4  # per run, without a terminal


@dataclass
class Work:
    """One training on the display; `cost` is its time relative to the other trainings."""

    name: str
    place: str  # "3/12"
    iterations: int
    tokens_per_iteration: int
    cost: float
    done: int = 0  # iterations
    over: bool = False

    @property
    def left(self) -> float:
        """Return the cost of the remaining iterations."""
        return 0.0 if self.over else self.cost * max(0, self.iterations - self.done) / self.iterations

    @property
    def title(self) -> str:
        """Return the training's place and name."""
        return f"{self.place} {self.name}"


class SweepDisplay:
    """Show the current training and all of them, with the time left."""

    def __init__(self, console: Console, works: list[Work]) -> None:
        self._console, self._works = console, works
        self._seconds_per_cost: float | None = None  # a moving average
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

    def follow(self, work: Work, lines: Iterable[str], *keep: Callable[[str], object]) -> None:
        """Show the progress that Megatron prints.

        Args:
            work: the training.
            lines: its output; the call returns when they end.
            keep: called with every line.
        """
        for event in events(lines, work.iterations, *keep):
            match event:
                case Resumed(iteration):
                    self.resume(work, iteration)
                case Evaluating(batch, batches):
                    self.note(work, f"evaluation {batch}/{batches}")
                case Logged(iteration, fields, fair=True):
                    self.iterate(work, iteration, seconds_per_iteration(fields), fields.get("lm loss"))

    def begin(self, work: Work) -> None:
        """Show that a training starts."""
        self._next_line = work.iterations / PLAIN_LINES
        self._progress.update(self._current, description=work.title, total=work.iterations, visible=True)
        self._show(work, "starting", plain=True)

    def resume(self, work: Work, iteration: int) -> None:
        """Show that the training continues from a checkpoint."""
        work.done = iteration
        self._show(work, f"goes on from iteration {iteration}", plain=True)

    def iterate(self, work: Work, iteration: int, seconds: float, loss: str | None = None) -> None:
        """Show a logged iteration.

        Args:
            work: the training.
            iteration: its number.
            seconds: mean time of an iteration since the previous line.
            loss: in nats per token, as printed.
        """
        work.done = iteration
        cost, before = max(seconds, 1e-9) * work.iterations / work.cost, self._seconds_per_cost
        self._seconds_per_cost = cost if before is None else 0.7 * before + 0.3 * cost
        speed = rate(work.tokens_per_iteration / max(seconds, 1e-9))
        parts = [f"{iteration}/{work.iterations}", f"loss {float(loss):.3f}" if loss else "", speed]
        note = "  ".join([*filter(None, parts), self._time_left([work])])
        self._show(work, note)
        if iteration >= self._next_line:
            self._next_line = iteration + work.iterations / PLAIN_LINES
            self._plain(f"{work.title}: {note} (all {self._time_left(self._works)})")

    def note(self, work: Work, note: str) -> None:
        """Show what the training does besides iterations."""
        self._show(work, note)

    def finish(self, work: Work, result: str) -> None:
        """Show that the training has ended, or had ended before."""
        work.over = True
        self._progress.update(self._current, visible=False)
        self._show(work, "")
        self.say(f"{work.title}: {result}")

    def _time_left(self, works: list[Work]) -> str:
        """Return the time left for trainings, without evaluations; "" before it is known."""
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
