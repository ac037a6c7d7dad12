"""Test that ruff, mypy and shellcheck find nothing. As tests they run in parallel with others, and -k selects one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import REPOSITORY

PYTHON = Path(sys.executable)


def shell_scripts() -> list[str]:
    """Return the paths of the repository's shell scripts."""
    command = "find . ( -path ./.venv -o -path ./.git -o -path ./runs ) -prune -o"
    command += " ( -name *.sh -o -name *.sbatch -o -path ./.ci/run ) -type f -print"
    return subprocess.run(command.split(), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


@pytest.mark.parametrize("name", ["ruff", "mypy", "shellcheck"])
def test_finds_nothing(name: str) -> None:
    command = {
        "ruff": [PYTHON, "-m", "ruff", "check", "--output-format", "concise", "."],
        "mypy": [PYTHON, "-m", "mypy"],
        "shellcheck": [PYTHON.with_name("shellcheck"), "--external-sources", *shell_scripts()],
    }[name]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        pytest.fail(result.stdout, pytrace=False)
