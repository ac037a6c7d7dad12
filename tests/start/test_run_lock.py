"""Test two training runs in one folder, with real processes on one machine and as if on two."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.remoe.files.errors import UsageError
from megatron.remoe.start import run_lock
from megatron.remoe.start.run_lock import LOCK, lock_save_folder
from tests.training_runs import REPOSITORY, TINY, last_error, popen, records, run, start

LEASE = 4.0
SHORT = 1.0  # for tests in which nobody holds the folder
HOLD = """
import argparse, socket, sys, time
if sys.argv[3]:
    socket.gethostname = lambda: sys.argv[3]
from megatron.remoe.start.run_lock import lock_save_folder
with lock_save_folder(argparse.Namespace(rank=0, skip_train=False, save=sys.argv[1]), float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, host: str = "") -> subprocess.Popen[str]:
    """Start a process that holds the folder, as if on a different machine if a host is given."""
    process = popen([sys.executable, "-c", HOLD, str(folder), str(LEASE), host], cwd=REPOSITORY)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def seconds_to_take(folder: Path, rank: int = 0, skip_train: bool = False, lease: float = LEASE) -> float:
    started = time.monotonic()
    with lock_save_folder(argparse.Namespace(rank=rank, skip_train=skip_train, save=str(folder)), lease):
        return time.monotonic() - started


@pytest.mark.parametrize("host", ["", "node7"], ids=["same machine", "other machine"])
def test_second_is_refused_and_a_dead_one_taken_over(host: str, tmp_path: Path) -> None:
    holder = hold(tmp_path, host)
    try:
        with pytest.raises(UsageError, match=rf"pid={holder.pid}, host=.*{host}"):
            seconds_to_take(tmp_path)
        assert seconds_to_take(tmp_path, rank=1) + seconds_to_take(tmp_path, skip_train=True) < 1, "they write nothing"
    finally:
        holder.kill()
        holder.wait()
    took = seconds_to_take(tmp_path)
    assert took > LEASE / 2 if host else took < LEASE / 2, "a process of this machine is seen to be gone at once"
    assert list(tmp_path.iterdir()) == []


LEASE_LINES = "filelock/2\npid=12\nhost=node7\nmode={}\ntoken=ab\nduration={}\n"


@pytest.mark.parametrize(
    ("content", "is_refused"),
    [("busy\n", False), (LEASE_LINES.format("lease", SHORT), False), (LEASE_LINES.format("shared", SHORT), True)],
    ids=["no lock at all", "a machine that is gone", "a mode of the future"],
)
def test_a_lock_left_behind(content: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).write_text(content)
    if not is_refused:
        seconds_to_take(tmp_path, lease=SHORT)
        return
    monkeypatch.setattr(run_lock, "SPARE_SECONDS", 0.0)
    with pytest.raises(UsageError, match=f"remove {tmp_path / LOCK}"):
        seconds_to_take(tmp_path, lease=SHORT)


def test_one_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    holder = hold(tmp_path, "node7")
    holder.send_signal(signal.SIGSTOP)
    with lock_save_folder(argparse.Namespace(rank=0, skip_train=False, save=str(tmp_path)), LEASE):
        holder.send_signal(signal.SIGCONT)
        output, _ = holder.communicate(timeout=20)
        assert holder.returncode == 1 and "another run took it over, and this one ends" in output
        assert f"pid={os.getpid()}\n" in (tmp_path / LOCK).read_text()


@pytest.mark.timeout(300)
def test_two_trainings_in_one_folder(data: Path, tmp_path: Path) -> None:
    """A second run is refused until the first is killed; then it resumes. Two ranks count as one run."""
    saving = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2", "--data-path", str(data)]
    first = start([*TINY, *saving, "--train-iters", "100000", "--lr-decay-iters", "8"], PYTHONUNBUFFERED="1")
    assert first.stdout is not None
    for line in first.stdout:
        if "successfully saved checkpoint from iteration       2 " in line:
            break
    second = [*TINY, *saving, "--train-iters", "100000", "--lr-decay-iters", "8", "--exit-interval", "4"]
    refused = run(second, expect=2)
    first.kill()
    first.communicate()
    assert f"--save {tmp_path}: another run writes there (pid={first.pid}, host=" in last_error(refused)
    assert not records(refused) and "] iteration " not in refused
    output = run(second, processes=2)
    assert min(records(output)) > 2
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("flag", ["--save", "--load"])
def test_nodes_that_do_not_share_the_folder(flag: str, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "other_node.py"
    script.write_text(
        "import os, sys\nfrom megatron.remoe import pretrain\nfrom megatron.remoe.start import run_lock\n"
        "run_lock.SECONDS_TO_APPEAR = 0.5\n"
        "if os.environ['RANK'] == '1':\n"
        f"    os.environ['LOCAL_RANK'] = '0'\n    sys.argv[sys.argv.index('{flag}') + 1] += '_of_the_other_node'\n"
        "sys.argv[0] = 'pretrain_gpt.py'\npretrain.main()\n"
    )
    arguments, folder = [*TINY, "--data-path", str(data), "--save-interval", "1"], str(tmp_path / "run")
    if flag == "--load":
        run([*arguments, "--save", folder, "--exit-interval", "2"])
        shutil.copytree(folder, other := Path(f"{folder}_of_the_other_node"))
        shutil.rmtree(other / "iter_0000002")
    output = run([*arguments, flag, folder], processes=2, expect=1, script=script)
    assert "REMOE-E105" in last_error(output) and "] iteration " not in output
