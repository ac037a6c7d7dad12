"""Write files and folders under a temporary name and rename them when complete; lock a folder."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .errors import ToolError


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` create a temporary file, then rename it to `path`: even a power cut leaves the old or the new file.

    Raises:
        OSError: the file cannot be written; the temporary one is removed.
    """
    aside = path.with_name(f"{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        write(aside)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` if the block ends without an exception, else remove it.

    Raises:
        OSError: it cannot be written, or `path` is not an empty folder at the end.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text(path: Path, text: str) -> None:
    """Write text to a file."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value to a file as JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers, each of which must be in the file once."""
    before, rest = path.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    write_text(path, f"{before}{begin}\n{text}\n{end}{after}")


def lock(folder: Path, tool: str) -> TextIO:
    """Lock a folder until the returned file is closed, here and in every process that inherited it.

    Args:
        folder: value of --output-dir; created if missing.
        tool: name of the tool, for the error.

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
            f"Another {tool} is running in {folder}. Wait for it, or give --output-dir another folder.", "REMOE-E503"
        ) from None
    return file
