"""Test faults in real training runs: a dead rank, a full disk, and a far too large λ."""

import math
import re
import time
from pathlib import Path

import psutil
import pytest

from megatron.remoe.start.checkpoint_files import check_complete
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError
from tests.checkpoints import training
from tests.tiny_model import RELU
from tests.training_runs import TINY, last_error, records, run, series, start

ENDS_WITHIN = 60.0  # seconds, as in docs/checkpoints.md: torchrun waits 30 s for the other ranks, then kills them
LIMITED = """
import resource
from megatron.remoe.pretrain import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
main()
"""
LOADERS = ["--num-workers", "2"]  # the default; data loader processes must end with their rank


@pytest.mark.timeout(150)
def test_a_rank_that_dies_ends_the_others(data: Path, tmp_path: Path) -> None:
    """The first stage gets SIGKILL, as if memory ran out. Ranks save at SIGTERM, as with the launch scripts."""
    saving = ["--save", str(tmp_path / "checkpoints"), "--save-interval", "100000", "--exit-signal-handler"]
    arguments = [*TINY, *RELU, *LOADERS, *saving, "--data-path", str(data), "--train-iters", "100000"]
    arguments += ["--pipeline-model-parallel-size", "2"]
    process, lines, died = start(arguments, 2, PYTHONUNBUFFERED="1"), [], 0.0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not died and "] iteration        3/" in line:
            ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
            died = time.monotonic()
            ranks["0"].kill()
    code, output = process.wait(), "".join(lines)
    took = time.monotonic() - died
    print(f"ended {took:.1f} s after the kill")
    assert died and code != 0 and took < ENDS_WITHIN, output[-3000:]
    assert "pretrain_gpt.py: error: rank 1: " in output and "Another rank has ended" in output, output[-3000:]
    report = output[output.index("Root Cause (first observed failure)") :]
    assert "rank      : 0 " in report and "Signal 9 (SIGKILL)" in report
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in commands if str(tmp_path / "checkpoints") in words]


@pytest.mark.timeout(200)
def test_file_that_cannot_grow(data: Path, tmp_path: Path) -> None:
    """A limit on file sizes makes the save of iteration 4 fail where a full disk would. The run can then resume."""
    words = training(data, tmp_path, *LOADERS)
    run([*words, "--exit-interval", "2"])
    half = max(file.stat().st_size for file in (tmp_path / "iter_0000002").iterdir()) // 2
    (script := tmp_path / "pretrain_gpt.py").write_text(LIMITED.format(half))
    message = last_error(run(words, expect=1, script=script))
    assert "File too large" in message and "iteration 2" in message
    assert "no whole checkpoint" in last_error(run(training(data, tmp_path / "new"), expect=1, script=script))
    with pytest.raises(BrokenCheckpointError):
        check_complete(tmp_path / "iter_0000004")
    assert list(records(run(words))) == [3, 4, 5, 6]


@pytest.mark.timeout(120)
def test_training_survives(data: Path) -> None:
    """With λ₀ = 1 (far too large, but in the paper's table 3), the loss falls and S reaches its target."""
    steps, hostile = 100, "--moe-relu-l1-reg-coeff-init 1 --micro-batch-size 8 --train-iters 100".split()
    output = run([*TINY, *RELU, *hostile, "--moe-relu-activation-limit", "1", "--data-path", str(data)])
    losses, layers = series(output, "lm loss"), series(output, "highest layer sparsity")
    assert len(losses) == steps and all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-20:]) / 20 < 3.0 < losses[0]
    assert sum(series(output, "sparsity")[-20:]) / 20 == pytest.approx(0.875, abs=0.05)
    assert max(layers[-20:]) < 0.99, "a layer is all but off at the end"
    # Layers still exceed a limit of 1 in some steps: one line, after S has reached its target.
    [warning] = re.findall("^Layers that work in chunks .*--moe-relu-activation-limit", output, re.MULTILINE)
    earlier = series(output[: output.index(warning)], "sparsity")
    assert max(earlier) >= 0.875
