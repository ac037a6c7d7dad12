"""How figures are printed and kept: a table, and a JSON file with machine and command."""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "megatron-core", "transformers")


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    model = platform.processor()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=max(100, Console().width)).print(table)


def save(path: Path, results: dict[str, Any]) -> None:
    """Write figures with date, machine and command, aside and renamed when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d %H:%M"), "command": " ".join(sys.argv), "machine": machine()}
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(head | results, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    print(f"Figures: {path}")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
