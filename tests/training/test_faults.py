"""Test faults in real training runs: a dead rank, a full disk, a far too large λ, and steps that are not finite."""

import math
import resource
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron.remoe.start.checkpoint_files import check_is_whole
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError
from tests.tiny_model import RELU
from tests.training_runs import TINY, records, run, series, start, weights

ENDS_WITHIN = 60.0  # seconds, as in docs/checkpoints.md: torchrun waits 30 for the other ranks, then kills them
END = 8
LOADERS = ["--num-workers", "2"]  # the default; these processes must end with their rank


def last_words(output: str) -> str:
    """Return the output from the entry's first error message on, up to 1,000 characters."""
    assert "pretrain_gpt.py: error: " in output, output[-3000:]
    return output[output.index("pretrain_gpt.py: error: ") :][:1000]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("layout", "victim"),
    [
        pytest.param([], 1, id="DP2", marks=pytest.mark.bulk),
        pytest.param(["--pipeline-model-parallel-size", "2"], 0, id="PP2"),
    ],
)
def test_a_rank_that_dies_ends_the_others(layout: list[str], victim: int, data: Path, tmp_path: Path) -> None:
    """One rank gets SIGKILL, as from the kernel if memory is short. Ranks save at SIGTERM, as under scripts/."""
    saving = ["--save", str(tmp_path / "checkpoints"), "--save-interval", "100000", "--exit-signal-handler"]
    arguments = [*TINY, *RELU, *LOADERS, *layout, *saving, "--data-path", str(data), "--train-iters", "100000"]
    process, lines, died = start(arguments, 2, PYTHONUNBUFFERED="1"), [], 0.0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not died and "] iteration        3/" in line:
            ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
            died = time.monotonic()
            ranks[str(victim)].kill()
    code, output = process.wait(), "".join(lines)
    took = time.monotonic() - died
    print(f"ended {took:.1f} s after the kill")
    assert died and code != 0 and took < ENDS_WITHIN, output[-3000:]
    message = last_words(output)
    assert f"rank {1 - victim}: " in message and "Another rank has ended" in message, message
    report = output[output.index("Root Cause (first observed failure)") :]
    assert f"rank      : {victim} " in report and "Signal 9 (SIGKILL)" in report
    assert not [child for child in psutil.process_iter() if "pretrain_gpt.py" in command(child, tmp_path)]


def command(process: psutil.Process, folder: Path) -> str:
    """Return the command line of a process, or "" if it does not contain the folder."""
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return words if str(folder) in words else ""


def saving(data: Path, folder: Path, *more: str) -> list[str]:
    flags = ["--save", str(folder), "--load", str(folder), "--save-interval", "2", "--train-iters", str(END)]
    return [*TINY, *RELU, *LOADERS, "--data-path", str(data), *flags, *more]


@pytest.mark.timeout(200)
def test_file_that_cannot_grow(data: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes the save of iteration 4 fail in the same place as a full disk; resuming goes on."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    run(saving(data, folder, "--exit-interval", "2"))
    process = start(saving(data, folder))
    half = max(file.stat().st_size for file in (folder / "iter_0000002").iterdir()) // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (half, half))
    output, _ = process.communicate(timeout=100)
    message = last_words(output)
    assert process.returncode == 1 and "File too large" in message and "Free some space" in message
    with pytest.raises(BrokenCheckpointError):
        check_is_whole(folder / "iter_0000004")
    assert list(records(run(saving(data, folder)))) == list(range(3, END + 1))
    run(saving(data, whole))
    right, mine = weights(whole, END), weights(folder, END)
    assert right.keys() == mine.keys() and all(torch.equal(right[key], mine[key]) for key in right)


@pytest.mark.timeout(120)
def test_training_survives(data: Path) -> None:
    """With λ₀ = 1 (far too large, but in the paper's table 3), the loss falls and S reaches its target."""
    steps, hostile = 100, "--moe-relu-l1-reg-coeff-init 1 --micro-batch-size 8 --train-iters 100".split()
    output = run([*TINY, *RELU, *hostile, "--data-path", str(data)])
    losses, layers = series(output, "lm loss"), series(output, "highest layer sparsity")
    assert len(losses) == steps and all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-20:]) / 20 < 3.0 < losses[0]
    assert sum(series(output, "sparsity")[-20:]) / 20 == pytest.approx(0.875, abs=0.05)
    assert max(layers[-20:]) < 0.99, "a layer is all but off at the end"


@pytest.mark.timeout(120)
def test_steps_that_are_not_finite(data: Path) -> None:
    """If the first step breaks the model, λ stays; with Megatron's check for NaN, the training ends with the reason."""
    broken = [*TINY, *RELU, *"--micro-batch-size 8 --lr 1e30 --min-lr 1e30".split(), "--data-path", str(data)]
    output = run([*broken, "--no-check-for-nan-in-loss-and-grad"])
    steps = [record for _, record in sorted(records(output).items())]
    assert [float(step["grad norm"]) > 0 for step in steps] == [True] + [False] * (len(steps) - 1)
    assert [float(step["l1 coefficient"]) for step in steps] == [1e-8] + [1.2e-8] * (len(steps) - 1)
    assert "guarded layers" not in output
    message = last_words(run(broken, expect=1))
    assert "found NaN in" in message and "--ckpt-step" in message
