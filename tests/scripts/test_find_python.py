"""Test which Python setup finds on simulated machines."""

import subprocess
from pathlib import Path

import pytest

from tests.scripts.setting_up import REAL, make_failing_shim, make_python, run_bash


def find(machine: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run find_python with the machine's folders a and b as PATH, and its own HOME and fixed places."""
    search = f'PATH="{machine}/a:{machine}/b"; find_python "{machine}/fixed"'
    return run_bash(search, **{"HOME": f"{machine}/home", "PYENV_ROOT": "", **variables})


def found(machine: Path, **variables: str) -> str:
    """Return kind and version of the chosen Python."""
    answer = find(machine, **variables)
    assert answer.returncode == 0 and answer.stderr == "", answer.stderr
    kind, version, path = answer.stdout.split(maxsplit=2)
    assert Path(path.strip()).resolve() == REAL.resolve()
    return f"{kind} {version}"


PYENV = "home/.pyenv/versions/{0}/bin/python"


@pytest.mark.parametrize(
    ("shims", "pythons", "expected"),
    [
        ("a/python3.12 a/python3.13", {"b/python3.13": "3.13.77"}, "ready 3.13.77"),
        ("a/python3.12", {"a/python3": "3.11.7", PYENV: "3.10.13"}, None),
        ("a/python3.12", {"a/python3": "3.11.7", PYENV: "3.12.66"}, "ready 3.12.66"),
        ("", {"a/python3": "3.13.5 bare"}, None),
        ("", {"a/python3": "3.13.5 bare", "fixed/usr/bin/python3.12": "3.12.3"}, "ready 3.12.3"),
        ("", {"a/python3": "3.14.1"}, "newer 3.14.1"),
        ("", {"a/python3": "3.14.1", "fixed/usr/local/bin/python3.13": "3.13.2"}, "ready 3.13.2"),
    ],
)
def test_the_first_complete_python_is_taken(
    shims: str, pythons: dict[str, str], expected: str | None, tmp_path: Path
) -> None:
    """Failing shims, old Pythons and those without ensurepip are skipped; a newer version is the last resort."""
    for shim in shims.split():
        make_failing_shim(tmp_path / shim)
    for place, text in pythons.items():
        version, _, bare = text.partition(" ")
        major, minor, micro = map(int, version.split("."))
        make_python(tmp_path / place.format(version), (major, minor, micro), ensurepip=not bare)
    if expected:
        assert found(tmp_path) == expected
    else:
        answer = find(tmp_path)
        assert answer.returncode == 1 and answer.stdout == "" and "command not found" not in answer.stderr
        assert (
            "No Python >= 3.12" in answer.stderr
            and f"{tmp_path}/a/python3 ({pythons['a/python3'].split()[0]})" in answer.stderr
        )
        assert all(words in answer.stderr for words in ("apt", "conda", "uv"))


def test_variables_say_where_a_python_is(tmp_path: Path) -> None:
    make_python(tmp_path / "elsewhere/versions/3.13.5/bin/python", (3, 13, 5))
    assert found(tmp_path, PYENV_ROOT=f"{tmp_path}/elsewhere") == "ready 3.13.5"
    make_python(tmp_path / "a/python3.12", (3, 12, 1))
    wanted = make_python(tmp_path / "b/mine", (3, 13, 9))
    assert found(tmp_path, PYTHON=str(wanted)) == "ready 3.13.9"
    for python in (make_python(tmp_path / "b/old", (3, 8, 18)), make_failing_shim(tmp_path / "b/shim")):
        answer = find(tmp_path, PYTHON=str(python))  # no silent fallback to another Python
        assert answer.returncode == 1 and answer.stdout == "" and f"PYTHON={python} " in answer.stderr
