"""Show the progress of a tool that works in steps: a bar on a terminal, and a line for each result."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def show_step(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error for a step with `total` parts; yield a function that counts parts as done."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # otherwise rich would send results meant for a file to the terminal
        disable=not console.is_terminal,
    ) as progress:
        yield partial(progress.advance, progress.add_task(title, total=total))


def say(console: Console, line: str, style: str = "") -> None:
    """Print a line in a style, without interpreting markup, coloring numbers or wrapping."""
    console.print(line, style=style, highlight=False, soft_wrap=True, markup=False)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], text: int) -> None:
    """Print a table to standard output; the first `text` columns are left-aligned, the others right-aligned."""
    table = Table(box=None, pad_edge=False)
    for column, title in enumerate(titles):
        table.add_column(title, justify="left" if column < text else "right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=500).print(table)  # on a narrower terminal, do not break words


def duration(seconds: float) -> str:
    """Format seconds as m:ss, h:mm:ss or 3 d 04:05 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, left = divmod(hours, 24)
    if days:
        return f"{days} d {left:02}:{minutes:02} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
