"""An environment with all packages of this one but Megatron and this project."""

import os
import subprocess
import sysconfig
import venv
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
    environment = {"OMP_NUM_THREADS": "1"}
    environment |= {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Code from a model's folder is copied before it is run.
    environment = (
        {"OMP_NUM_THREADS": "1"}
        | environment
        | {"HF_MODULES_CACHE": str(python.parents[1] / "modules"), "HF_HUB_OFFLINE": "1"}
    )
    command = [python, "-P", program, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ToolError(f"{program}, without Megatron: failed with exit code {done.returncode}.\n{done.stderr[-2000:]}")
    return done.stdout
