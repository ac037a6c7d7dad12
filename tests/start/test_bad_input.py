"""Test mistakes in flags, files and environment: each ends at once with a short message, and changes no file."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.remoe.files.indexed import bin_path, idx_path
from megatron.remoe.start.unhelpful_warnings import GPT_MODEL
from tests.data_sets import write_documents
from tests.entry import LIMIT, shared_entry
from tests.start.mistakes import ENTRY, HYBRID, fill, on, plain
from tests.tiny_model import RELU
from tests.training_runs import last_error

LINES = 3


def changes(folder: Path) -> dict[Path, int]:
    """Return each file → when the system last changed it; programs cannot set this time."""
    return {path: path.stat().st_ctime_ns for path in folder.rglob("*") if path.is_file()}


def make_data_sets(user: Path, source: Path) -> None:
    for path in (bin_path, idx_path):
        for name in ("text", "short_bin"):
            shutil.copy(path(source), path(user / name))
    os.truncate(user / "short_bin.bin", 1000)
    write_documents(user / "few", [b"abc"])
    write_documents(user / "one", [b"abc" * 1000])
    (user / "file").write_text("a regular file\n")
    (user / "release").mkdir()
    (user / "release" / "latest_checkpointed_iteration.txt").write_text("release")


@pytest.fixture(scope="module")
def user(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    user = tmp_path_factory.mktemp("user")
    make_data_sets(user, data)
    relu = " ".join(RELU)
    runs = {"remoe": relu, "dense": "", "hybrid": f"{relu} {HYBRID}"}
    for name, routing in runs.items():
        saving = f"--save @{name} --save-interval 2 --train-iters 2"
        code, output = shared_entry().run(fill(plain(f"{routing} {saving}"), user))
        assert code == 0, output[-3000:]
    return user


@pytest.fixture(scope="module")
def used_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.timeout(3 * LIMIT)
@pytest.mark.parametrize("name", ENTRY)
def test_entry(name: str, user: Path, used_port: str) -> None:
    case, before = ENTRY[name], changes(user)
    environment = {key: value or used_port for key, value in (case.environment or {}).items()}
    code, output = shared_entry().run(fill(case.arguments, user), environment)
    assert code is not None, f"hangs: {output[-2000:]}"
    message = last_error(output)
    assert code == case.code and message.count("\n") <= LINES and len(message) < 1000, message
    for part in case.message.split("|"):
        assert part in message
    if code == 2 or "REMOE-E" in message:
        assert "Traceback" not in output
    after = changes(user)
    assert {path: after.get(path) for path in before} == before, "a file of the user's has changed"


def test_resuming_allows_changed_length_and_folders(user: Path, tmp_path: Path) -> None:
    """Length, micro-batch size, intervals and folders can change on resuming. A second start has nothing to do."""
    shutil.copytree(user / "remoe", tmp_path / "moved")
    for path in (bin_path, idx_path):
        shutil.copy(path(user / "text"), path(tmp_path / "text"))
    moved = str(tmp_path / "moved")
    others = "--train-iters 4 --lr-decay-iters 2 --micro-batch-size 2 --log-interval 2 --save-interval 3"
    places = f"--load {moved} --save {moved} --data-path {tmp_path / 'text'}"
    arguments = fill(on("text", f"{others} --eval-interval 7 --eval-iters 1 {places}"), user)
    code, output = shared_entry().run(arguments)
    assert code == 0 and "iteration        4/       4" in output and "Nothing to do" not in output, output[-2000:]
    assert output.count(GPT_MODEL) == 1
    code, output = shared_entry().run(arguments)
    assert code == 0 and "validation loss at iteration 4" in output
    last = output.splitlines()[-1]
    assert last.startswith("Nothing to do: the checkpoint in --load")
    assert "is at iteration 4, and --train-iters is 4" in last
