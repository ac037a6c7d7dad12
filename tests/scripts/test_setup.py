"""Test the search for Python, and that setup.sh leaves a foreign .venv alone. CI runs the real setup."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.console.places import ROOT


def test_setup_keeps_a_foreign_venv_and_a_linked_one(tmp_path: Path) -> None:
    tree = tmp_path / "a tree"  # the blank breaks unquoted shell variables
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    (tree / ".venv" / "theirs").mkdir(parents=True)
    setup = ["bash", tree / "scripts" / "setup.sh"]
    assert subprocess.run(setup).returncode == 1 and (tree / ".venv" / "theirs").exists()
    (tree / ".venv").rename(tree / "elsewhere")
    (tree / ".venv").symlink_to(tree / "elsewhere")
    assert subprocess.run(setup).returncode == 1 and (tree / ".venv" / "theirs").exists()
    assert (tree / ".venv").is_symlink()


@pytest.mark.parametrize(("pythons", "expected"), [
    ({"a/python3.13": "exit 127", "b/python3.13": "echo 13", "a/python3": "echo 3"}, "13"),  # after a broken shim
    ({"a/python3.12": "exit 1", "b/python3": "echo 3"}, "3"),
    ({"a/python3": "exit 1"}, None),
    ({"a/python3.13": "echo 13", "b/my python": "echo mine"}, "mine"),
    ({"a/python3.13": "echo 13", "b/my python": "exit 1"}, None),  # no silent fallback
])  # fmt: skip
def test_the_first_python_that_fits_is_used(pythons: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, line in pythons.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    source = f'source "{ROOT}/scripts/lib/environment.sh"; PATH="{tmp_path}/a:{tmp_path}/b"; find_python'
    environment = os.environ | {"PYTHON": str(tmp_path / "b/my python") if "b/my python" in pythons else ""}
    answer = subprocess.run(["bash", "-c", source], env=environment, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.strip()) == ((0, expected) if expected else (1, ""))
    assert bool(answer.stderr) == (expected is None)
