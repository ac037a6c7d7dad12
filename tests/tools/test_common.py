"""Test the tools' shared helpers and the command `remoe`."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.remoe.files.files import write_atomically
from tests.training_runs import REPOSITORY
from tools.console.errors import ToolError
from tools.console.files import lock, new_folder
from tools.start import COMMANDS, IMPORT_TORCH

TOOLS = REPOSITORY / "tools"


def run(*words: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"env": environment, "text": True, "timeout": 100, "capture_output": True} | settings
    return subprocess.run([sys.executable, *map(str, words)], **settings)


@pytest.mark.parametrize("command", [*COMMANDS, "preprocess_data.py"])
def test_starts_from_any_folder_and_has_one_name(command: str, tmp_path: Path) -> None:
    options = ["-S"] if command in IMPORT_TORCH else []  # without site-packages: torch is not imported
    words = [TOOLS / command] if command.endswith(".py") else [TOOLS, command]
    result = run(*options, *words, "--help", cwd=tmp_path)
    name = "preprocess" if command.endswith(".py") else command
    assert result.returncode == 0 and result.stdout.startswith(f"usage: remoe {name} "), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "code", "printed"),
    [("--help", 0, "\n  generate "), ("--version", 0, "0.1"), ("genrate", 2, "generate"), ("xyz", 2, "--help")],
)
def test_the_entry(word: str, code: int, printed: str) -> None:
    result = run(TOOLS, word)
    assert result.returncode == code and printed in (result.stderr if code else result.stdout)


@pytest.mark.parametrize(
    ("words", "missing"),
    [("generate --load x", "torch"), ("preprocess", "rich"), ("quickstart", "tokenizers"),
     ("analyze --load x --data-path y", "matplotlib")],
)  # fmt: skip
def test_a_python_without_packages_is_told_which_one_to_use(words: str, missing: str) -> None:
    result = run("-S", TOOLS, *words.split())  # -S: without site-packages
    assert result.returncode == 2 and "Traceback" not in result.stderr and f"has no {missing}" in result.stderr
    assert sys.executable in result.stderr and f"{REPOSITORY}/.venv/bin/python" in result.stderr


# ---------------------------------------------------------------- files


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"

    def fail(aside: Path) -> None:
        aside.write_text("hal")
        raise OSError("no space left")

    def write_twice(aside: Path) -> None:  # like two writers with the same process id, in two containers
        aside.write_text("first")
        write_atomically(path, lambda aside: aside.write_text("second"))

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert list(tmp_path.iterdir()) == []
    write_atomically(path, write_twice)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.txt", "first")]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    """An interrupted write leaves nothing, and a second writer does not replace a complete folder."""
    path = tmp_path / "checkpoint"
    for text, left in (("cut off", []), ("whole", ["whole"]), ("other", ["whole"])):
        with contextlib.suppress(OSError), new_folder(path) as aside:
            (aside / "weights").write_text(text)
            assert path.exists() == (text == "other")
            if text == "cut off":
                raise OSError("no space left")
        assert [file.read_text() for file in tmp_path.glob("**/weights")] == left
        assert len([*tmp_path.iterdir()]) == len(left)


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    with lock(tmp_path / "runs", "sweep"), pytest.raises(ToolError, match="sweep .*/runs"):
        lock(tmp_path / "runs", "sweep")
    lock(tmp_path / "runs", "sweep").close()


# ---------------------------------------------------------------- processes

NOHUP = """
import os, signal
from tools.runs.running import run_tool
signal.signal(signal.SIGHUP, signal.SIG_IGN)
raise SystemExit(run_tool("test", lambda: os.kill(os.getpid(), signal.SIGHUP)))
"""


def test_a_tool_under_nohup_continues_after_a_hangup() -> None:
    assert run("-c", NOHUP, cwd=REPOSITORY).returncode == 0
