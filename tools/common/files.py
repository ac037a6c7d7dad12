"""Write folders under a temporary name and rename them when complete; lock a folder. Files: `data/files.py`."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron.remoe.data.files import take_lock, write_text

from .errors import ToolError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` if the block ends without an exception, else remove it.

    Raises:
        OSError: it cannot be written, or `path` is not an empty folder at the end.
    """
    path = path.resolve()  # a link to an empty folder stays one
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value to a file as JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def lock(folder: Path, tool: str) -> TextIO:
    """Lock a tool's --output-dir until the returned file is closed, here and in every process that inherited it.

    Raises:
        ToolError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    if not take_lock(file):
        file.close()
        raise ToolError(
            f"Another {tool} is running in {folder}. Wait for it, or give --output-dir another folder.", "REMOE-E503"
        )
    return file
