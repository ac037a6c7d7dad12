"""Read a run: its logged figures, and evaluations of its checkpoints."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console.places import run_folder
from ..runs.figure_reader import read_figures
from ..runs.run_figures import RunFigures

EVALUATED = {"text", "speed", "tasks"}  # what remoe evaluate writes
LARGEST_EVALUATION = 2**24  # bytes


@dataclass
class Run:
    """A run.

    Attributes:
        name: unique on a page.
        figures: from its log.
        evaluations: file of remoe evaluate → its content.
        notes: things that could not be read or counted, and why.
    """

    name: str
    figures: RunFigures = field(default_factory=RunFigures)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(place: Path, name: str) -> Run:
    """Read the files of a run.

    Raises:
        ToolError: there are none, or they are of something else.
        OSError: they cannot be read.
    """
    run = Run(name, read_figures(place))
    if run.figures.unread:
        run.notes.append(f"{name}: {run.figures.unread:,} lines of its log cannot be read and are left out.")
    for path in sorted({*place.glob("*.json"), *run_folder(place).glob("*.json")}):
        if path.stat().st_size <= LARGEST_EVALUATION:
            with suppress(ValueError, RecursionError):  # another program's file
                held = json.loads(path.read_text(encoding="utf-8", errors="replace"))
                if isinstance(held, dict) and held and held.keys() <= EVALUATED:
                    run.evaluations[path.name] = held
    return run
