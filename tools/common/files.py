"""Files that are whole whenever they exist, and a lock on a folder."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .errors import ToolError


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole text, aside and renamed."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A value as JSON, aside and renamed."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks, each of which is once in the file."""
    before, rest = path.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def lock(folder: Path, tool: str) -> TextIO:
    """Take the folder for this call; held until the file is closed by this process and all that inherited it.

    Args:
        folder: of --output-dir, made where it is missing.
        tool: what to call a call.

    Raises:
        ToolError: another call is at work there.
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
