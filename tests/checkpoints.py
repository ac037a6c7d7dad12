"""Make the checkpoints of a tiny training run, and damage them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_model import RELU
from tests.training_runs import TINY, assert_equal, weights


def training(data: Path, folder: Path, *more: str) -> list[str]:
    """Return the arguments of a run that saves at iterations 2, 4 and 6, and resumes from the newest checkpoint."""
    saving = ["--save", str(folder), "--load", str(folder), "--save-interval", "2", "--train-iters", "6"]
    return [*TINY, *RELU, "--data-path", str(data), *saving, *more]


class Saved:
    """The checkpoints in a folder; `saved[6]` is the folder of iteration 6."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getitem__(self, iteration: int) -> Path:
        return self.root / f"iter_{iteration:07d}"

    def copy(self, root: Path) -> "Saved":
        return Saved(Path(shutil.copytree(self.root, root)))

    def assert_same_weights(self, other: "Saved", iteration: int) -> None:
        assert_equal(weights(other.root, iteration), weights(self.root, iteration))


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip the lowest bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tensors(folder: Path) -> Path:
    """Return an iteration's first file with tensors."""
    return min(folder.glob("*.distcp"))
