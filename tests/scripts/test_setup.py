"""Test creating, updating and reusing .venv, without network."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.scripts.setting_up import REAL, make_python, run_bash
from tools.console.places import ROOT


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
        version = ".".join(str(part) for part in sys.version_info[:3])
        assert self.stamp.read_text().startswith(f"{version} {self.root / '.venv'}\n")
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
    assert re.search(r"^Setting up \.venv with Python 3\.\d+\.\d+ .*\n(  \S.* +\d+ s\n){4}The environment is rea", out)
    tree.assert_complete()
    assert {name for name in tree.installed() if name.startswith("torch-")} == {"torch-1+cpu"}
    return tree


def test_a_second_set_up_does_not_call_pip(finished: Tree) -> None:
    before = finished.log.read_text(), finished.log.stat().st_mtime_ns, finished.stamp.stat().st_mtime_ns
    (pip,) = finished.root.glob(".venv/lib/*/site-packages/pip")
    pip.rename(pip.with_name("away"))  # a call would fail
    try:
        code, out, err = finished.set_up()
    finally:
        pip.with_name("away").rename(pip)
    assert (code, out, err) == (0, f"Ready: {finished.root}/.venv/bin/python\n", "")
    assert (finished.log.read_text(), finished.log.stat().st_mtime_ns, finished.stamp.stat().st_mtime_ns) == before


def test_changed_requirements_bring_the_environment_up_to_date_in_place(finished: Tree) -> None:
    make_wheel(finished.root / "wheels", "torch", "2")
    finished.pin_torch("2")
    kept = finished.root / ".venv/kept"
    kept.touch()
    path = make_python(finished.root / "other/python3.12", (3, 12, 99)).parent
    code, out, err = finished.set_up(PYTHON="", PATH=f"{path}:{os.environ['PATH']}")  # would be found first
    assert code == 0, out + err
    assert out.startswith("Bringing .venv up to date")
    assert kept.exists() and "torch-2" in finished.installed()
    finished.assert_complete()


def test_a_failed_set_up_shows_the_end_of_the_log_and_the_next_one_starts_over(finished: Tree) -> None:
    finished.pin_torch("99")
    leftover = finished.root / ".venv/leftover"
    leftover.touch()
    code, out, err = finished.set_up()
    assert code == 1
    assert re.search(r"^  torch +failed after \d+ s$", out, re.MULTILINE)
    assert "torch==99" in err
    assert f"the whole log is in {finished.log}" in err
    assert finished.stamp.read_text() == "unfinished\n"
    finished.pin_torch("1")
    code, out, err = finished.set_up()
    assert code == 0, out + err
    assert out.startswith("Setting up .venv") and not leftover.exists()
    finished.assert_complete()


def test_a_missing_network_is_said(tree: Tree) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}
    code, _, err = tree.set_up(**nowhere)
    assert code == 1 and err.startswith("No network") and "conflict" not in err and str(tree.log) in err


def test_a_moved_tree_and_another_python_are_set_up_anew(finished: Tree) -> None:
    def is_ready(root: Path, found: str = "") -> bool:
        return run_bash(f'environment_is_ready "{found}"', root=root).returncode == 0

    moved = finished.root.with_name("moved")
    finished.root.rename(moved)
    try:
        assert not is_ready(moved)
    finally:
        moved.rename(finished.root)
    assert is_ready(finished.root) and not is_ready(finished.root, "ready 3.12.999 /some/python")
    version = ".".join(str(part) for part in sys.version_info[:3])
    assert is_ready(finished.root, f"ready {version} /some/python")


def test_a_set_up_that_was_killed_starts_over(tree: Tree) -> None:
    process = tree.start()
    deadline = time.monotonic() + 300
    while not (tree.root / ".venv/bin/python").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert tree.stamp.read_text() == "unfinished\n"
    (tree.root / ".venv/leftover").touch()
    code, out, err = tree.set_up()
    assert code == 0, out + err
    assert not (tree.root / ".venv/leftover").exists()
    tree.assert_complete()


@pytest.mark.skipif(shutil.which("flock") is None, reason="two set-ups at once are kept apart by flock")
def test_of_two_set_ups_at_once_one_waits_for_the_other(tree: Tree) -> None:
    first = tree.start()
    while not tree.stamp.exists():
        assert first.poll() is None
        time.sleep(0.02)
    code, out, err = tree.set_up()
    first_out, first_err = first.communicate(timeout=300)
    assert (first.returncode, code) == (0, 0), first_out + first_err + out + err
    assert out.startswith("Another set-up is at work here") and "Setting up" not in out
    tree.assert_complete()


def test_an_environment_of_other_make_and_a_link_are_left_alone(finished: Tree, tree: Tree) -> None:
    """A foreign .venv and a link, as in a checkout that shares another's environment, are refused and kept."""
    theirs, link = tree.root / ".venv/bin/python", tree.root / ".venv"
    theirs.parent.mkdir(parents=True)
    theirs.symlink_to(REAL)
    code, _, err = tree.set_up()
    assert code == 1 and "was not made by this script" in err and theirs.exists()
    shutil.rmtree(link)
    link.symlink_to(finished.root / ".venv")
    code, _, err = tree.set_up()
    assert code == 1 and f"{link} is a link" in err and link.is_symlink()
    finished.assert_complete()


def test_no_script_expands_an_empty_array() -> None:
    """With `set -u`, Bash before 4.4 (macOS) treats an empty array as an unset variable."""
    scripts = [path for path in (*ROOT.glob("*.sh"), *(ROOT / "scripts").rglob("*.s[hb]*")) if path.is_file()]
    texts = {path.name: path.read_text() for path in scripts}
    assert texts.keys() >= {"data_preprocessing.sh", "environment.sh", "train.sbatch"}
    for name, text in texts.items():
        for array in re.findall(r"(\w+)=\(\)", text):
            expanded = f'"${{{array}[@]}}"'
            assert expanded not in text.replace(f"${{{array}[@]+{expanded}}}", ""), f"{name}: {array}"


@pytest.mark.parametrize("script", ["quickstart", "setup", "test"])
def test_help_sets_nothing_up(script: str, tree: Tree) -> None:
    command = ["bash", str(tree.root / f"scripts/{script}.sh"), "--help"]
    answer = subprocess.run(command, env=tree.environment(), capture_output=True, text=True)
    header = (ROOT / f"scripts/{script}.sh").read_text().split("\nset -euo")[0]
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.splitlines() == [line[2:] for line in header.splitlines()[1:]]
    assert not (tree.root / ".venv").exists() and not tree.log.exists()


def test_help_is_the_tools_own_where_all_is_ready(finished: Tree) -> None:
    tool = finished.root / "tools"
    tool.mkdir(parents=True)
    (tool / "__main__.py").write_text("import sys; print(sys.prefix, sys.argv[1:])")
    command = ["bash", str(finished.root / "scripts/quickstart.sh"), "--tiny", "--help"]
    answer = subprocess.run(command, env=finished.environment(), capture_output=True, text=True)
    assert answer.stdout == f"{finished.root / '.venv'} ['quickstart', '--help']\n", answer.stderr
