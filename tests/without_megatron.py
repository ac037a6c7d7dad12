"""Make an environment with the packages of the current one, except Megatron and this project."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path


def make(folder: Path) -> Path:
    """Make the environment in a folder that does not exist; return its interpreter."""
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "megatron" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(python: Path, program: str | Path, *words: str | Path) -> str:
    """Run a program in the environment; assert that it succeeds, and return its standard output."""
    folder = python.parents[1]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # transformers copies a model's code here before it runs it.
    settings |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    words = (python, "-P", program, *words)
    done = subprocess.run([*map(str, words)], cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
