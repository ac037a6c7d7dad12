"""An environment with all packages of this one but Megatron and this project."""

import os
import shlex
import subprocess
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.errors import ToolError


def without_megatron(folder: Path) -> Path:
    """Make it in a folder that does not exist; returns its interpreter."""
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "megatron" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(python: Path, program: str | Path, *words: str | Path) -> str:
    """What a program prints there.

    Raises:
        ToolError: it failed.
    """
    folder = python.parents[1]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Code from a model's folder is copied before it is run.
    settings |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return printed_by([python, "-P", program, *words], folder, settings)


def printed_by(command: Sequence[str | Path], folder: Path, settings: Mapping[str, str]) -> str:
    """What a process prints.

    Args:
        command: its words.
        folder: where it runs.
        settings: its environment; one thread where they say nothing of it.

    Raises:
        ToolError: it failed.
    """
    words, settings = [*map(str, command)], {"OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ToolError(f"{shlex.join(words)}: failed with exit code {done.returncode}.\n{done.stderr[-2000:]}")
    return done.stdout
