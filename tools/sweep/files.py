"""Files that are whole whenever they exist, and the lock on a sweep's folder."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from sweep_errors import SweepError


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.new{path.suffix}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def lock(folder: Path) -> TextIO:
    """Take the folder for this call; held until the file is closed by this process and all that inherited it.

    Raises:
        SweepError: another call is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SweepError(
            f"Another sweep is at work in {folder}. Wait for it, or give --output-dir another folder."
        ) from None
    return file
