"""Test creating, remaking and reusing .venv, without network."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.console.places import ROOT

REAL = Path(getattr(sys, "_base_executable", sys.executable))


def make_wheel(folder: Path, name: str, version: str, *extras: str) -> Path:
    """Build an installable wheel that contains only its metadata."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Provides-Extra: {extra}\n" for extra in extras)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path


BACKEND = """
import shutil
def build_editable(folder, config_settings=None, metadata_directory=None):
    shutil.copy("wheels/megatron_remoe-1-py3-none-any.whl", folder)
    return "megatron_remoe-1-py3-none-any.whl"
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


class Tree:
    """The project's scripts with empty packages, so that the real pip runs briefly and offline."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log, self.stamp = root / "runs/setup.log", root / ".venv/remoe-setup"
        shutil.copytree(ROOT / "scripts", root / "scripts")
        for name, *extras in (("torch",), ("megatron-core", "training"), ("setuptools",), ("megatron-remoe", "dev")):
            make_wheel(root / "wheels", name, "1", *extras)
        (root / "backend.py").write_text(BACKEND)
        (root / "pyproject.toml").write_text(PYPROJECT)
        self.pin_torch("1")

    def pin_torch(self, version: str) -> None:
        (self.root / "requirements.txt").write_text(f"torch=={version}\n")

    def environment(self, **variables: str) -> dict[str, str]:
        """Return an environment in which pip finds only this tree's wheels, as if PyPI could not be reached."""
        pip = {"PIP_INDEX_URL": (self.root / "no-index").as_uri(), "PIP_FIND_LINKS": (self.root / "wheels").as_uri()}
        inherited = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX_URL"}
        return inherited | pip | {"PYTHON": str(REAL), "PIP_CONFIG_FILE": os.devnull} | variables

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "scripts/setup.sh")],
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def set_up(self, **variables: str) -> tuple[int, str, str]:
        """Run scripts/setup.sh; return its exit code, stdout and stderr."""
        process = self.start(**variables)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def installed(self) -> set[str]:
        folders = self.root.glob(".venv/lib/*/site-packages/*.dist-info")
        return {folder.name.removesuffix(".dist-info") for folder in folders}

    def assert_complete(self) -> None:
        assert f"\n{self.root / '.venv'} " in self.stamp.read_text()
        assert {"megatron_core-1", "setuptools-1", "megatron_remoe-1"} <= self.installed()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "a tree")  # the blank breaks unquoted shell variables


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Return a tree that is set up with torch from TORCH_INDEX_URL; every test leaves it set up."""
    tree = Tree(tmp_path_factory.mktemp("finished") / "tree")
    wheel = make_wheel(tree.root / "index/torch", "torch", "1+cpu")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    code, out, err = tree.set_up(TORCH_INDEX_URL=(tree.root / "index").as_uri())
    assert code == 0, out + err + tree.log.read_text()
    assert re.search(r"^Making \.venv with .*\n(  \S.* +\d+ s\n){5}Ready: ", out)
    tree.assert_complete()
    assert {name for name in tree.installed() if name.startswith("torch-")} == {"torch-1+cpu"}
    return tree


def test_a_second_setup_does_nothing(finished: Tree) -> None:
    before = finished.log.stat().st_mtime_ns, finished.stamp.stat().st_mtime_ns
    assert finished.set_up() == (0, f"Ready: {finished.root}/.venv/bin/python\n", "")
    assert (finished.log.stat().st_mtime_ns, finished.stamp.stat().st_mtime_ns) == before


def test_changed_requirements_update_the_environment(finished: Tree) -> None:
    """An update is made in place. A failed one shows the end of its log. Then one of two setups starts over."""
    leftover = finished.root / ".venv/leftover"
    leftover.touch()
    make_wheel(finished.root / "wheels", "torch", "2")
    finished.pin_torch("2")
    code, out, err = finished.set_up()
    assert code == 0 and leftover.exists() and "torch-2" in finished.installed(), out + err
    finished.pin_torch("99")
    code, out, err = finished.set_up()
    assert code == 1 and "torch==99" in err and f"{finished.log}" in err
    assert finished.stamp.read_text() == "unfinished\n"
    finished.pin_torch("1")
    processes = [finished.start(), finished.start()] if shutil.which("flock") else [finished.start()]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    assert sum("Making .venv" in out for out, _ in outputs) == 1 and not leftover.exists()
    finished.assert_complete()


def test_an_environment_of_other_make_and_a_link_are_left_alone(finished: Tree, tree: Tree) -> None:
    venv = tree.root / ".venv"
    (venv / "theirs").mkdir(parents=True)
    assert tree.set_up()[0] == 1 and (venv / "theirs").exists()
    shutil.rmtree(venv)
    venv.symlink_to(finished.root / ".venv")
    assert tree.set_up()[0] == 1 and venv.is_symlink()
    finished.assert_complete()


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        ({"a/python3.13": "exit 127", "b/python3.13": "echo 13", "a/python3": "echo 3"}, "13"),  # a shim before it
        ({"a/python3.12": "exit 1", "b/python3": "echo 3"}, "3"),
        ({"a/python3": "exit 1"}, None),
        ({"a/python3.13": "echo 13", "b/my python": "echo mine"}, "mine"),
        ({"a/python3.13": "echo 13", "b/my python": "exit 1"}, None),  # no silent fallback
    ],
)
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


@pytest.mark.parametrize("script", ["quickstart", "setup", "test"])
def test_help_sets_nothing_up(script: str, tree: Tree) -> None:
    command = ["bash", str(tree.root / f"scripts/{script}.sh"), "--help"]
    answer = subprocess.run(command, env=tree.environment(), capture_output=True, text=True)
    header = (ROOT / f"scripts/{script}.sh").read_text().split("\nset -euo")[0]
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines() == [line[2:] for line in header.splitlines()[1:]]
    assert not (tree.root / ".venv").exists() and not tree.log.exists()
