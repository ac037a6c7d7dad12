"""Write folders under a temporary name and rename them when complete, and lock them.

For single files see `megatron/remoe/files/files.py`.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron.remoe.files.files import take_lock, write_text

from .errors import ToolError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` if the block ends without an exception, else remove it.

    Raises:
        OSError: it cannot be written, or something other than an empty folder exists at `path` at the end.
    """
    path = path.resolve()  # a link to an empty folder stays a link
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
            f"Another {tool} is running in {folder}. Wait for it, or give a different folder.", "REMOE-E503"
        )
    return file


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a file of JSON, empty if the file cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
