"""Test two trainings in one folder, with real processes on one machine and as if on two."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.remoe.files.errors import UsageError
from megatron.remoe.start.run_lock import HOLDER, LOCK, lock_save_folder
from tests.trainings import REPOSITORY, TINY, records, run, start

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
    """Start a process that holds the folder, as if on another machine if a host is given."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(LEASE), host],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )
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
        with pytest.raises(UsageError, match=rf"process {holder.pid} on .*{host}.*, started 20.* UTC\. Wait"):
            seconds_to_take(tmp_path)
        assert seconds_to_take(tmp_path, rank=1) + seconds_to_take(tmp_path, skip_train=True) < 1, "they write nothing"
    finally:
        holder.kill()
        holder.wait()
    took = seconds_to_take(tmp_path)
    assert took > LEASE / 2 if host else took < LEASE / 2, "a process of this machine is seen to be gone at once"
    assert list(tmp_path.iterdir()) == []


def lease(**fields: object) -> str:
    """Return the record of a lease, as filelock writes it."""
    lines = {"pid": 12, "host": "node7", "mode": "lease", "token": "ab", "duration": SHORT} | fields
    return "".join(["filelock/2\n", *(f"{name}={value}\n" for name, value in lines.items())])


LEFT_BEHIND = {
    "no lock at all": ("busy\n", ""),
    "a machine that is gone": (lease(), ""),
    "a process that is gone": (lease(pid=999_999, host=socket.gethostname()), ""),
    "a mode of the future": (lease(mode="shared"), "remove it"),
    "another lease": (lease(duration=2 * SHORT), "remove it"),
}


@pytest.mark.parametrize(("content", "remedy"), LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_what_was_left_behind(content: str, remedy: str, tmp_path: Path) -> None:
    """A dead run's lock is taken over; one that is not understood is refused, both after the lease."""
    (tmp_path / LOCK).write_text(content)
    started = time.monotonic()
    if remedy:
        with pytest.raises(UsageError, match=f"{tmp_path / LOCK} .* {remedy}"):
            seconds_to_take(tmp_path, lease=SHORT)
        assert (tmp_path / LOCK).read_text() == content
    else:
        seconds_to_take(tmp_path, lease=SHORT)
        assert list(tmp_path.iterdir()) == []
    assert (time.monotonic() - started < SHORT) == ("999999" in content)


def test_one_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    holder = hold(tmp_path, "node7")
    holder.send_signal(signal.SIGSTOP)
    with lock_save_folder(argparse.Namespace(rank=0, skip_train=False, save=str(tmp_path)), LEASE):
        holder.send_signal(signal.SIGCONT)
        output, _ = holder.communicate(timeout=20)
        assert holder.returncode == 1 and "another training took it over, and this one ends" in output
        assert f"process {os.getpid()} on " in (tmp_path / HOLDER).read_text() and (tmp_path / LOCK).exists()


@pytest.mark.timeout(300)
def test_two_trainings_in_one_folder(data: Path, tmp_path: Path) -> None:
    """A second training is refused until the first is killed; then it resumes. Two ranks count as one training."""
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
    message = refused[refused.rindex("pretrain_gpt.py: error: ") :]
    assert f"--save {tmp_path}: another training writes there: process {first.pid} on " in message
    assert not records(refused) and "] iteration " not in refused
    output = run(second, processes=2)
    assert min(records(output)) > 2
    assert not (tmp_path / LOCK).exists() and not (tmp_path / HOLDER).exists()
