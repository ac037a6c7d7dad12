"""Test a tiny sweep: it trains, resumes, notices other settings, and ends at a second interrupt."""

import csv
import io
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import rich.progress
from rich.console import Console

from tests.entry import shared_entry
from tests.tools.sweeping import logged, start, sweep
from tests.trainings import REPOSITORY, SMALL, finish, records
from tools.console.flags import words_of
from tools.experiments.sweep import plan, results
from tools.experiments.sweep.settings import planned_flags
from tools.runs import training_display
from tools.runs.training_display import ShownTraining, TrainingDisplay

PNG = b"\x89PNG\r\n\x1a\n"
ITERATIONS = 20
FLAGS = [
    *SMALL,
    *"--moe-ffn-hidden-size 128 --split 80,20,0 --eval-interval 20 --eval-iters 2 --ckpt-format torch".split(),
]


SLOW_TO_SAVE = """
import os, sys
from pathlib import Path
from tools.recipes.process import run_training
print(os.getpid(), flush=True)
slow = "bash -c 'trap : TERM; for i in {1..900}; do sleep 0.1; done'; true"
sys.exit(run_training(["bash", "-c", slow], Path(sys.argv[1])))
"""


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three trainings run at once, and each takes 90 seconds to save. The third does not start."""
    shown = [ShownTraining(name, iterations=10, tokens_per_iteration=1, cost=1.0) for name in "abc"]
    output, interrupts = io.StringIO(), []

    def train(place: int) -> None:
        command = [sys.executable, "-c", SLOW_TO_SAVE, str(tmp_path / f"{place}.log")]
        with (tmp_path / f"{place}.pid").open("w", buffering=1) as log:
            display.run(shown[place], command, os.environ | {"PYTHONPATH": str(REPOSITORY)}, log)

    def interrupt_twice() -> None:
        while not all((tmp_path / f"{place}.log").exists() for place in (0, 1)):  # tee and the training have started
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(1.0)
            interrupts.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt_twice)
    with (tmp_path / "lock").open("w") as lock, TrainingDisplay(Console(file=output), shown, lock) as display:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            display.run_all([partial(train, place) for place in range(3)], at_once=2)
    assert time.monotonic() - interrupts[1] < 30
    thread.join()
    assert "saving a checkpoint" in output.getvalue() and "was killed" not in output.getvalue()
    assert not (tmp_path / "2.pid").exists()
    for place in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{place}.pid").read_text().split()[0]), 0)


def test_time_left_counts_neither_reused_nor_failed_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four trainings have the same cost, and the clock advances one second per iteration."""
    shown = [ShownTraining(name, iterations=100, tokens_per_iteration=1, cost=100.0) for name in "abcd"]
    clock = partial(rich.progress.Progress, get_time=lambda: float(min(shown[1].done, 10) + shown[2].done))
    monkeypatch.setattr(training_display, "Progress", clock)
    output = io.StringIO()
    console = Console(file=output, width=200)
    with (tmp_path / "lock").open("w") as lock, TrainingDisplay(console, shown, lock) as display:
        display.finish(shown[0], "reused")
        for training, end in ((shown[1], 20), (shown[2], 70)):
            lines = "".join(logged(at, 100) for at in range(10, end, 10))
            display.run(training, ["printf", "%s", lines], dict(os.environ))
            display.finish(training, "failed")
    found = re.findall(r"c: (\d+)/100 .* all: (\S+) left", output.getvalue())
    assert found == [("30", "2:50"), ("60", "2:20")]


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_the_last_line_of_a_resumed_training_is_shown(cut: int, tmp_path: Path) -> None:
    shown, output = ShownTraining("a", iterations=20, tokens_per_iteration=1, cost=1.0), io.StringIO()
    lines = [f"successfully loaded checkpoint from RUN [ t 1/1 ] at iteration {cut}\n"]
    lines += [logged(at, 20) for at in range(cut + 1, 21)]
    console = Console(file=output, width=200)
    with (tmp_path / "lock").open("w") as lock, TrainingDisplay(console, [shown], lock) as display:
        display.run(shown, ["printf", "%s", "".join(lines)], dict(os.environ))
    assert f"goes on from iteration {cut}" in output.getvalue() and " a: 20/20  loss" in output.getvalue()


# ---------------------------------------------------------------- real trainings


def states(folder: Path) -> dict[str, str]:
    with (folder / "results.csv").open() as file:
        return {row["run"]: row["state"] for row in csv.DictReader(file)}


@pytest.mark.slow
def test_trains_goes_on_and_notices_other_settings(data: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "sweep"
    common = f"--output-dir {output_dir} --gpus-per-node 1 --micro-batch-size 2 --train-iters {ITERATIONS}".split()
    environment = {"DATA_PATH": str(data)}
    granularity = [*common, "--figures", "granularity", "--routings", "remoe", "--granularities"]
    log = output_dir / "llama_182m_remoe_e8g1" / "train.log"

    # Stop the first run; it saves a checkpoint.
    process = start(*granularity, "1", "2", "--", *FLAGS, **environment)
    while process.poll() is None and not (log.exists() and len(records(log.read_text())) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, errors = finish(process, code=130)
    assert "saving a checkpoint" in output and "The same command goes on from here" in errors
    assert states(output_dir) == {"llama_182m_remoe_e8g1": "unfinished", "llama_182m_remoe_e8g2": "not started"}
    cut = max(records(log.read_text()))
    assert cut < ITERATIONS

    # 3 does not divide the FFN size: that run fails, the other does not.
    output, errors = sweep(*granularity, "3", "1", "--", *FLAGS, code=1, **environment)
    assert "1/2 llama_182m_remoe_e8g3: failed with exit code" in output
    assert "--moe-granularity" in output and f"The whole log: {output_dir}/llama_182m_remoe_e8g3/train.log" in output
    assert f"2/2 llama_182m_remoe_e8g1: goes on from iteration {cut}" in output
    assert "2/2 llama_182m_remoe_e8g1: validation loss" in output
    assert "1 of 2 runs did not finish: llama_182m_remoe_e8g3." in errors
    assert list(records(log.read_text())) == list(range(1, ITERATIONS + 1))

    # Another figure reuses the run that both have.
    routings = ["--routings", "remoe", "moe-warmup"]
    experts = [*common, "--figures", "experts", *routings, "--experts", "8"]
    output, _ = sweep(*experts, "--", *FLAGS, **environment)
    assert "2 runs in" in output and "1 finished; 1 to train" in output
    assert states(output_dir) == {
        "llama_182m_moe_e8g1_warmup": "finished",
        "llama_182m_remoe_e8g1": "finished",
        "llama_182m_remoe_e8g3": "not started",  # it failed before its first step
    }
    check_results(output_dir)

    # All done: nothing is trained again.
    before = {path: path.stat().st_mtime_ns for path in output_dir.glob("llama*/**/*")}
    output, _ = sweep(*experts, "--", *FLAGS, **environment)
    assert "2 finished; 0 to train" in output
    assert {path: path.stat().st_mtime_ns for path in output_dir.glob("llama*/**/*")} == before

    _, errors = sweep(*experts, "--train-iters", "40", "--", *FLAGS, "--lr", "1e-3", code=2, **environment)
    changed = f"--lr was 5e-4 and is now 1e-3; --train-iters was {ITERATIONS} and is now 40"
    assert f"llama_182m_moe_e8g1_warmup: {changed}" in errors and "another --output-dir" in errors
    assert {path: path.stat().st_mtime_ns for path in output_dir.glob("llama*/**/*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("axis", plan.AXES)
def test_each_setting_trains(axis: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each axis trains at its largest value; tests/tools/test_compare.py trains each routing."""
    run = plan.plan([axis], {}, None)[-1]
    launch = plan.Launch(tmp_path, 1, 2, 2, tuple(FLAGS))
    with monkeypatch.context() as context:  # shared_entry() may start its process here and keep the environment
        context.setenv("DATA_PATH", str(data))
        flags = words_of(planned_flags(launch, run, anywhere=False))
    code, printed = shared_entry().run(flags, limit=120)
    assert code == 0 and run.axis == axis, printed[-3000:]


def check_results(folder: Path) -> None:
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "finished"]
    for row in rows:
        log = (folder / row["run"] / "train.log").read_text()
        iterations = int(row["train_iters"])
        printed = re.findall(rf"loss at iteration {iterations} on validation set \| lm loss value: (\S+)", log)
        assert float(row["validation_loss"]) == pytest.approx(float(printed[-1]), rel=1e-5)
        assert int(row["tokens"]) == iterations * 4 * 64 and float(row["flops"]) > 0
        assert float(row["tokens_per_second"]) > 0
        if row["routing"] == "remoe":
            assert float(row["target_sparsity"]) == pytest.approx(1 - 1 / int(row["experts"]))
            assert float(row["sparsity"]) == pytest.approx(float(records(log)[ITERATIONS]["sparsity"]), abs=1e-6)
        printed = re.findall(r"number of parameters on .*: (\d+)", log)
        assert row["total_parameters"] == printed[-1]
    markdown = (folder / "results.md").read_text()
    loss = float(rows[0]["validation_loss"])
    assert f"| llama_182m_moe_e8g1_warmup | {loss:.4f} |" in markdown
    assert len(results.rows_of(folder, [])) == 3 and (folder / "results.png").read_bytes().startswith(PNG)
