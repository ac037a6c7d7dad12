"""Test restarts in the same process after an error: same weights and log, and the folder stays locked."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from megatron.remoe.start.run_lock import LOCK
from megatron.remoe.training.run_log import read_run_log
from tests.tiny_model import RELU
from tests.trainings import TINY, figures, run, weights

SCRIPT = Path(__file__).with_name("restarting.py")
HAS_NVRX = importlib.util.find_spec("nvidia_resiliency_ext") is not None
STEPS = 12


def training(data: Path, folder: Path) -> list[str]:
    saving = ["--save", str(folder), "--load", str(folder), "--save-interval", "2", "--train-iters", str(STEPS)]
    evaluation = "--log-interval 2 --eval-interval 4 --eval-iters 1".split()
    return [*TINY, *RELU, "--data-path", str(data), *saving, *evaluation]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["plain", pytest.param("nvrx", marks=pytest.mark.skipif(not HAS_NVRX, reason="NVRx"))])
def test_errors_leave_no_trace(how: str, data: Path, tmp_path: Path) -> None:
    """At the first error the newest checkpoint is one step old; at the second it is of the same step."""
    expected, restarted = tmp_path / "expected", tmp_path / "restarted"
    run(training(data, expected))
    output = run([how, *training(data, restarted)], script=SCRIPT)
    starts = [line["iteration"] for line in read_run_log(restarted / "metrics.jsonl") if line["kind"] == "start"]
    assert starts == [0, 4, 8], output[-3000:]
    locks = {line for line in output.splitlines() if line.startswith("lock: ")}
    assert len(locks) == 1 and f"pid={os.getpid()}" not in locks.pop(), "one owner, of one lease"
    assert not (restarted / LOCK).exists()
    right, mine = weights(expected, STEPS), weights(restarted, STEPS)
    assert right.keys() == mine.keys() and all(torch.equal(right[key], mine[key]) for key in right)
    assert figures(restarted, 2) == figures(expected, 2)


@pytest.mark.skipif(HAS_NVRX, reason="it is installed")
def test_without_nvrx_it_is_refused(data: Path, tmp_path: Path) -> None:
    output = run([*training(data, tmp_path), "--inprocess-restart"], expect=2)
    assert "nvidia-resiliency-ext" in output and "REMOE-E210" in output and "Traceback" not in output


def test_a_restart_needs_the_folder_that_it_saves_to(data: Path, tmp_path: Path) -> None:
    flags = training(data, tmp_path)
    at = flags.index("--load")
    output = run([*flags[:at], *flags[at + 2 :], "--inprocess-restart"], expect=2)
    assert f"--load {tmp_path}" in output and "REMOE-E210" in output and "Traceback" not in output
