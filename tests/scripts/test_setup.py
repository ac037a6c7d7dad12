"""Test the search for Python, --help, and that setup.sh leaves a foreign .venv alone. CI runs the real setup."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.console.places import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with the scripts; the blank in its name breaks unquoted shell variables."""
    shutil.copytree(ROOT / "scripts", tmp_path / "a tree" / "scripts")
    return tmp_path / "a tree"


def start(tree: Path, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", str(tree / f"scripts/{script}.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_setup_keeps_a_foreign_venv_and_a_linked_one(tree: Path) -> None:
    venv = tree / ".venv"
    (venv / "theirs").mkdir(parents=True)
    assert start(tree, "setup").returncode == 1 and (venv / "theirs").exists()
    venv.rename(tree / "elsewhere")
    venv.symlink_to(tree / "elsewhere")
    assert start(tree, "setup").returncode == 1 and venv.is_symlink() and (venv / "theirs").exists()


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


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("", 1), ("12", 2)])
def test_the_example_answers_in_any_folder(words: str, code: int, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "examples/rehearse_30b.sh"), *words.split()]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == code and "gpus" in f"{answer.stdout}{answer.stderr}".lower(), answer.stderr


@pytest.mark.parametrize("script", ["quickstart", "setup", "test"])
def test_help_sets_nothing_up(script: str, tree: Path) -> None:
    answer = start(tree, script, "--help")
    header = (ROOT / f"scripts/{script}.sh").read_text().split("\nset -euo")[0]
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines() == [line[2:] for line in header.splitlines()[1:]]
    assert sorted(path.name for path in tree.iterdir()) == ["scripts"]
