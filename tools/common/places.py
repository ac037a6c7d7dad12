"""Paths of the project."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def short(path: Path) -> Path:
    """Return a path relative to the current folder if it is in there, else unchanged."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
