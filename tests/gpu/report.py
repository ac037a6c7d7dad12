"""Keep the figures of GPU tests in --gpu-report's folder for this card: a file per test, and a table, report.md."""

import json
import re
from pathlib import Path
from typing import Any

from tools.console.files import write_json, write_text
from tools.console.markdown import table


class Report:
    """Keeps the figures of one test.

    Attributes:
        folder: the folder for this card.
        path: the test's file.
    """

    def __init__(self, folder: Path, card: str, test: str) -> None:
        self.folder = folder.resolve() / re.sub(r"\W+", "-", card.lower()).strip("-")
        self.path = self.folder / f"{test}.json"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, figures: dict[str, Any]) -> None:
        """Write the test's figures and the table now, so that they exist even if a time limit ends the session."""
        write_json(self.path, figures)
        files = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        write_text(self.folder / "report.md", "\n".join(table(["test", "figures"], map(row, files))) + "\n")


def row(path: Path) -> list[str]:
    """Return a test's name and its figures that are single numbers or strings."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    single = {name: value for name, value in figures.items() if isinstance(value, int | float | str)}
    shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in single.items())
    return [path.stem, "; ".join(shown)]
