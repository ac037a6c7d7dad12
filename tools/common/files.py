"""Write files aside and rename them when they are complete; lock a folder."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .errors import ToolError


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file next to `path`, then rename it; after a power cut the old or the new one is whole.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    aside = path.with_name(f"{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        write(aside)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """Write a whole text."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two marks, each of which is in the file once."""
    before, rest = path.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def lock(folder: Path, tool: str) -> TextIO:
    """Lock a folder, until the returned file is closed by this process and all that inherited it.

    Args:
        folder: of --output-dir, made if it is missing.
        tool: its name, for the message.

    Raises:
        ToolError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ToolError(
            f"Another {tool} is at work in {folder}. Wait for it, or give --output-dir another folder."
        ) from None
    return file
