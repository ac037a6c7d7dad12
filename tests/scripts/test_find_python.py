"""Which Python set-up finds, on machines that are made up."""

import subprocess
from pathlib import Path

import pytest

from tests.scripts.setting_up import REAL, make_failing_shim, make_python, run_bash


class Machine:
    """A made-up machine: folders for PATH, for HOME and for the fixed places."""

    def __init__(self, folder: Path) -> None:
        self.first, self.second, self.home, self.fixed = (folder / name for name in ("a", "b", "home", "fixed"))

    def find(self, **variables: str) -> subprocess.CompletedProcess[str]:
        search = f'PATH="{self.first}:{self.second}"; find_python "{self.fixed}"'
        return run_bash(search, **{"HOME": str(self.home), "PYENV_ROOT": "", **variables})

    def found(self, **variables: str) -> list[str]:
        """Kind and version of the Python that is chosen."""
        answer = self.find(**variables)
        assert answer.returncode == 0 and answer.stderr == "", answer.stderr
        kind, version, path = answer.stdout.split(maxsplit=2)
        assert Path(path.strip()).resolve() == REAL.resolve()
        return [kind, version]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_shim_that_fails_is_passed_over_for_the_same_name_further_on(machine: Machine) -> None:
    make_failing_shim(machine.first / "python3.12")
    make_failing_shim(machine.first / "python3.13")
    make_python(machine.second / "python3.13", (3, 13, 77))
    assert machine.found() == ["ready", "3.13.77"]


def test_a_python_too_old_is_passed_over_for_one_in_pyenvs_folders(machine: Machine) -> None:
    make_failing_shim(machine.first / "python3.12")
    make_python(machine.first / "python3", (3, 11, 7))
    make_python(machine.home / ".pyenv/versions/3.10.13/bin/python", (3, 10, 13))
    make_python(machine.home / ".pyenv/versions/3.12.66/bin/python", (3, 12, 66))
    assert machine.found() == ["ready", "3.12.66"]


def test_pyenv_root_says_where_pyenvs_folders_are(machine: Machine, tmp_path: Path) -> None:
    make_python(tmp_path / "elsewhere/versions/3.13.5/bin/python", (3, 13, 5))
    assert machine.found(PYENV_ROOT=str(tmp_path / "elsewhere")) == ["ready", "3.13.5"]


def test_a_python_without_ensurepip_is_the_choice_only_where_no_complete_one_is(machine: Machine) -> None:
    make_python(machine.first / "python3", (3, 13, 5), ensurepip=False)
    make_python(machine.first / "python3.14", (3, 14, 1))
    assert machine.found() == ["bare", "3.13.5"]
    make_python(machine.fixed / "usr/bin/python3.12", (3, 12, 3))
    assert machine.found() == ["ready", "3.12.3"]


def test_a_python_newer_than_the_wheels_is_the_last_resort(machine: Machine) -> None:
    make_python(machine.first / "python3", (3, 14, 1))
    assert machine.found() == ["newer", "3.14.1"]
    make_python(machine.fixed / "usr/local/bin/python3.13", (3, 13, 2))
    assert machine.found() == ["ready", "3.13.2"]


def test_without_any_python_the_message_says_what_was_looked_for_and_how_to_get_one(machine: Machine) -> None:
    answer = machine.find()
    assert answer.returncode == 1 and answer.stdout == ""
    for words in ("No Python >= 3.12", "python3.12, python3.13", "pyenv's", "Too old: none", "apt", "conda", "uv"):
        assert words in answer.stderr


def test_the_message_names_the_pythons_that_are_too_old(machine: Machine) -> None:
    old = make_python(machine.first / "python3", (3, 9, 2))
    make_failing_shim(machine.first / "python3.12")
    answer = machine.find()
    assert answer.returncode == 1
    assert f"Too old: {old} (3.9.2)." in answer.stderr
    assert "command not found" not in answer.stderr


def test_the_variable_python_comes_first_and_is_not_silently_replaced(machine: Machine) -> None:
    make_python(machine.first / "python3.12", (3, 12, 1))
    wanted = make_python(machine.second / "mine", (3, 13, 9))
    assert machine.found(PYTHON=str(wanted)) == ["ready", "3.13.9"]
    old = make_python(machine.second / "old", (3, 8, 18))
    shim = make_failing_shim(machine.second / "shim")
    for python, words in ((old, "is Python 3.8.18; 3.12 or newer is needed"), (shim, "does not run")):
        answer = machine.find(PYTHON=str(python))
        assert answer.returncode == 1 and answer.stdout == ""
        assert f"PYTHON={python} {words}" in answer.stderr
        assert "unset it" in answer.stderr
