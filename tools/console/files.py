"""Write folders under a temporary name and rename them when complete, lock them, and stamp them.

A stamp is a file with a fingerprint of the inputs. It is written after the results, so a later call with the same
inputs can reuse them. For single files see `megatron/remoe/files/files.py`.
"""

import ast
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron.remoe.files.files import take_lock, write_text

from .errors import ToolError

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


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


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 hash, in hexadecimal, of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_of_code(paths: Iterable[Path]) -> str:
    """Return a hash of Python files without their comments and docstrings, in the order of their paths."""
    trees = [ast.parse(path.read_bytes()) for path in sorted(paths)]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                del node.body[0]
    return fingerprint([ast.dump(tree) for tree in trees])


def read_stamp(path: Path, inputs: str) -> dict[str, Any] | None:
    """Return the stamp at `path`, or None if it cannot be read or its fingerprint is not `inputs`."""
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and stamp.get("inputs") == inputs else None


def recreate_folder(folder: Path) -> None:
    """Create a folder, or remove its content."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
