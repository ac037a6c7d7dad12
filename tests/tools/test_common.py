"""Test the tools' shared helpers, and that tools start from any folder and import their modules from `tools` only."""

import ast
import os
import pty
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.remoe.files.files import write_aside
from tests.trainings import REPOSITORY
from tools.console import places
from tools.console.errors import ToolError
from tools.console.files import lock, new_folder, write_json
from tools.experiments import compare
from tools.start import COMMANDS, IMPORT_TORCH

TOOLS = REPOSITORY / "tools"
STARTED = sorted(path.parent for path in TOOLS.glob("*/__main__.py"))
STARTED += sorted(path for path in TOOLS.glob("*.py") if path.name not in ("__init__.py", "start.py"))


def test_all_cores_where_a_process_is_not_bound_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """--processes defaults to all cores without `os.sched_getaffinity`, as on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert compare.parse_arguments([]).processes == os.cpu_count()


@pytest.mark.parametrize("folder", ["clone", "remoe"])
def test_a_clone_can_have_any_name(folder: str, tmp_path: Path) -> None:
    copy = tmp_path / folder / "tools" / "common" / "places.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(places.__file__, copy)
    (tmp_path / folder / "pretrain_gpt.py").touch()
    assert runpy.run_path(str(copy))["PACKAGE"] == tmp_path / folder / "megatron" / "remoe"


@pytest.mark.parametrize("tool", STARTED, ids=lambda path: str(path.relative_to(TOOLS)))
def test_starts_from_any_folder(tool: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["-S"] if tool.name in IMPORT_TORCH else []  # without site-packages: torch is not imported
    command = [sys.executable, *options, str(tool), "--help"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage: "), result.stderr
    assert not list(tmp_path.iterdir())


def test_no_module_is_a_top_level_name() -> None:
    own = {path.stem for path in TOOLS.rglob("*.py")} | {path.name for path in TOOLS.iterdir() if path.is_dir()}
    for path in TOOLS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & own, path


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "results.txt"

    def fail(aside: Path) -> None:
        aside.write_text("hal")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_aside(path, fail)
    assert list(tmp_path.iterdir()) == []
    write_aside(path, lambda aside: aside.write_text("whole"))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.txt", "whole")]


def test_writers_with_the_same_process_number_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """In two containers, for example, both processes can have the number 1."""
    path = tmp_path / "results.txt"

    def write(aside: Path) -> None:
        aside.write_text("first")
        write_aside(path, lambda aside: aside.write_text("second"))

    write_aside(path, write)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.txt", "first")]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"

    def write() -> None:
        with new_folder(path) as aside:
            (aside / "weights").write_text("whole")
            assert not path.exists()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write()
    assert list(tmp_path.iterdir()) == []
    with new_folder(path) as aside:
        (aside / "weights").write_text("whole")
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["whole"]
    with pytest.raises(OSError), new_folder(path) as aside:
        (aside / "weights").write_text("other")
    assert [file.read_text() for file in tmp_path.rglob("*") if file.is_file()] == ["whole"]


@pytest.mark.parametrize("name", [".", "../link"])
def test_a_folder_replaces_an_empty_one_under_any_name(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    with new_folder(Path(name)) as aside:
        (aside / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert (tmp_path / "empty" / "file").exists() and (tmp_path / "link").is_symlink()


def test_a_written_file_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "results.json", []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(Path(f"/proc/self/fd/{file}").resolve()) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(Path(new)) or rename(old, new))
    write_json(path, {"a": 1})
    assert [calls[1], calls[2]] == [path, tmp_path] and calls[0].name.endswith("results.json") and len(calls) == 3
    assert path.read_text() == '{\n "a": 1\n}\n'


def test_a_folder_is_taken_once(tmp_path: Path) -> None:
    with lock(tmp_path / "runs", "sweep"), pytest.raises(ToolError, match="sweep .*/runs"):
        lock(tmp_path / "runs", "sweep")
    lock(tmp_path / "runs", "sweep").close()


STEPS = """
from tools.console.display import Display
display = Display()
with display.step("reading", 2):
    display.say("a result")
"""


def test_results_go_to_the_file_while_the_bar_is_on_the_terminal() -> None:
    terminal, side = pty.openpty()
    command = [sys.executable, "-c", STEPS]
    settings = {"cwd": REPOSITORY, "env": os.environ | {"TERM": "xterm"}, "timeout": 60, "text": True}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, check=True, **settings)
    os.close(side)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert result.stdout == "a result\n"
    assert "reading" in shown and "a result" not in shown


@pytest.mark.parametrize("tool", [".", "preprocess_data.py"])
def test_another_python_is_told_which_one_to_use(tool: str) -> None:
    command = [
        sys.executable,
        "-S",
        str(REPOSITORY / "tools" / tool),
        "generate",
        "--load",
        "RUN",
    ]  # -S: without site-packages
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert sys.executable in result.stderr and f"{REPOSITORY}/.venv/bin/python" in result.stderr


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["nothing"], 2)])
def test_all_commands_are_listed(words: list[str], code: int) -> None:
    result = subprocess.run([sys.executable, REPOSITORY / "tools", *words], capture_output=True, text=True)
    assert result.returncode == code
    assert all(f"\n  {name} " in result.stdout + result.stderr for name in COMMANDS)


def test_a_tool_under_nohup_goes_on_after_a_hangup() -> None:
    program = """
import os, signal
from tools.runs.running import run_tool
signal.signal(signal.SIGHUP, signal.SIG_IGN)
raise SystemExit(run_tool("test", lambda: os.kill(os.getpid(), signal.SIGHUP)))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=50).returncode == 0


def test_a_worker_that_its_pool_terminates_ends_at_once() -> None:
    program = """
import os, signal, time
from tools.runs.running import run_tool

def work() -> None:
    worker = os.fork()
    if not worker:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(60)  # as one that waits for a lock which nobody gives back
    time.sleep(1)
    os.kill(worker, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))

run_tool("test", work)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=50)
    assert result.stdout == "143\n", result.stderr
