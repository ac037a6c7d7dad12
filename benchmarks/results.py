"""How figures are shown and kept: progress, a table, and a JSON file with machine and command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from models import on_gpu

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError:  # a lent GPU machine may have PyTorch and nothing else
    Console = None  # type: ignore[assignment, misc]

PACKAGES = ("torch", "megatron-core", "transformers")


def machine() -> dict[str, Any]:
    """Processor, cores, versions and, where there are some, GPUs with their driver."""
    model = platform.processor()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    found = {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    return found | ({"gpus": gpus()} if on_gpu() else {})


@cache
def gpus() -> list[str]:
    """Name and driver of each; not from PyTorch, which would hold the device in this process too."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return ["unknown"]


def milliseconds(seconds: float) -> str:
    """With a unit, and three digits at least."""
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr with the time left.

    Args:
        total: number of measurements.

    Yields:
        What is to be called after each of them, with a line that tells it.
    """
    if Console is None:
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with Progress(TextColumn("measuring"), *columns, console=console, redirect_stdout=False) as bar:
        task = bar.add_task("", total=total)

        def done(line: str) -> None:
            bar.console.print(line)
            bar.advance(task)

        yield done


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: Path) -> None:
    """Print a table, numbers to the right, and where the figures are."""
    texts = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    if Console is None:
        print("\n".join([title, *("\t".join(row) for row in (columns, *texts)), f"Figures: {path}"]))
        return
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in texts:
        table.add_row(*row)
    Console(width=max(100, Console().width)).print(table)
    print(f"Figures: {path}")


def save(path: Path, results: dict[str, Any]) -> None:
    """Write figures with date, machine and command, aside and renamed when whole.

    Benchmarks do so after each case, which a run that is cut off keeps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d %H:%M"), "command": " ".join(sys.argv), "machine": machine()}
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(head | results, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
