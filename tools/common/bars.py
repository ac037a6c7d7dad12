"""Bars for works that are done one after another, and the time that they will take."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .units import duration


class Bars:
    """On a terminal: a description, a bar and a note for each task. Learns how long a unit of cost takes."""

    def __init__(self, console: Console, description: str) -> None:
        self._console = console
        self._seconds_per_cost: float | None = None
        self._progress = Progress(
            TextColumn(description),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def _took(self, seconds_per_cost: float) -> None:
        """A unit of cost took so long just now."""
        before = self._seconds_per_cost
        self._seconds_per_cost = seconds_per_cost if before is None else 0.7 * before + 0.3 * seconds_per_cost

    def _time_for(self, cost: float, more: float = 0.0) -> str:
        """How long so much cost, and `more` seconds, will take; empty while that is not known."""
        return "" if self._seconds_per_cost is None else f"{duration(cost * self._seconds_per_cost + more)} left"
