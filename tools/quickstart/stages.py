"""What makes a second call reuse the work of the first: fingerprints of inputs, and stamps that are written last."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO


class QuickstartError(Exception):
    """Something the user can act on; the message says what happened and what to do."""


def fingerprint(*parts: Any) -> str:
    """Hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_of_files(paths: Iterable[Path]) -> str:
    """Hash of the files' contents, in the order of their paths."""
    return fingerprint([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)])


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it: `path` is whole whenever it exists."""
    aside = path.with_name(f"{path.stem}.new{path.suffix}")
    write(aside)
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, aside and renamed."""
    write_aside(path, lambda aside: aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def read_stamp(path: Path, inputs: str) -> dict[str, Any] | None:
    """The stamp at `path`, or None if there is none or it was made from other inputs."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("inputs") == inputs else None


def fresh_folder(path: Path) -> Path:
    """An empty folder at `path`."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def lock(folder: Path) -> TextIO:
    """Take the folder for this call; held until the file is closed by this process and all that inherited it.

    Raises:
        QuickstartError: another call is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise QuickstartError(
            f"Another quickstart is at work in {folder}. Wait for it, or give --output-dir another folder."
        ) from None
    return file
