"""Tools started with a Python that lacks what they need, and the command that starts all of them."""

import subprocess
import sys

import pytest

from tests.trainings import REPOSITORY
from tools.start import COMMANDS


@pytest.mark.parametrize("tool", ["generate", "sweep", "preprocess_data.py"])
def test_another_python_is_told_which_one_to_use(tool: str) -> None:
    command = [sys.executable, "-S", str(REPOSITORY / "tools" / tool), "--help"]  # -S: without site-packages
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert sys.executable in result.stderr and f"{REPOSITORY}/.venv/bin/python" in result.stderr


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--help"], 0), (["nothing"], 2)])
def test_all_commands_are_listed(words: list[str], code: int) -> None:
    result = subprocess.run([sys.executable, REPOSITORY / "tools", *words], capture_output=True, text=True)
    assert result.returncode == code
    assert all(f"\n  {name} " in result.stdout + result.stderr for name in COMMANDS)
