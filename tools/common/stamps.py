"""Reuse results of an earlier call: a stamp with a fingerprint of the inputs is written after them."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def fingerprint(*parts: Any) -> str:
    """Return a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_of_files(paths: Iterable[Path]) -> str:
    """Return a hash of the files' contents, in the order of their paths."""
    return fingerprint([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)])


def read_stamp(path: Path, inputs: str) -> dict[str, Any] | None:
    """Return the stamp at `path`, or None if there is none or it has other inputs."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("inputs") == inputs else None


def make_empty(folder: Path) -> Path:
    """Create a folder, or remove its content, and return it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
