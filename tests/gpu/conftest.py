"""The report of the GPU tests: a table of the figures in --gpu-report, printed last and kept as report.md."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.common.files import write_text
from tools.common.markdown import table


def row(path: Path) -> list[str]:
    """Return a test's name and its single numbers and words."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    single = {name: value for name, value in figures.items() if isinstance(value, int | float | str)}
    shown = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in single.items())
    return [path.stem, "; ".join(shown)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    folder: Path | None = config.getoption("--gpu-report")
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime) if folder else []
    if folder and files:
        lines = table(["test", "figures"], map(row, files))
        write_text(folder / "report.md", "\n".join(lines) + "\n")
        terminalreporter.write_line("\n".join([*lines, f"Report: {folder / 'report.md'}"]))
