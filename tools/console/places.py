"""Paths of the project, in a clone and in an installed package."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # root of a clone, or the installed megatron/remoe
LOG = "train.log"  # output of the run, in its folder
# Only a clone has this file; an installed package has tools/ in megatron/remoe.
PACKAGE = ROOT / "megatron" / "remoe" if (ROOT / "pretrain_gpt.py").exists() else ROOT


def run_folder(path: Path) -> Path:
    """Return a run's folder, given that folder or the checkpoints/ in it."""
    return path.parent if path.name == "checkpoints" else path


def is_clone() -> bool:
    """Return whether the tools run from a clone."""
    return PACKAGE != ROOT


def home() -> Path:
    """Return the folder that holds runs/: the clone, or the current folder."""
    return ROOT if is_clone() else Path.cwd()


def entry() -> list[str]:
    """Return the words that start a training run, after the interpreter."""
    return [str(ROOT / "pretrain_gpt.py")] if is_clone() else ["-m", "megatron.remoe.pretrain"]


def interpreter() -> str:
    """Return the Python of .venv in a clone that has it, else the running one."""
    venv = ROOT / ".venv" / "bin" / "python"
    return str(venv) if is_clone() and os.access(venv, os.X_OK) else sys.executable


def tool(command: str) -> list[str]:
    """Return the words that start a command of `remoe`, for a user who is in the current folder."""
    installed = ROOT / ".venv" / "bin" / "remoe"
    return [str(short(installed)) if is_clone() and installed.exists() else "remoe", command]


def short(path: Path) -> Path:
    """Return a path relative to the current folder if it is inside it, else unchanged."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
