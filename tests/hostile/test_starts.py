"""Start several trainings in one folder at once: each step runs once, and trainings without a step say why."""

import shutil

import pytest

from megatron.remoe.start.run_lock import HOLDER, LOCK
from megatron.remoe.training.run_log import read_run_log
from tests.hostile.conftest import Noted
from tests.hostile.trials import LIMIT, STEPS, Trial, check_words, same_weights, training
from tests.trainings import records, start


@pytest.mark.bulk
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fresh", [True, False], ids=["new folder", "resumes"])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize("number", range(3))
def test_concurrent_starts(count: int, fresh: bool, number: int, trial: Trial, note: Noted) -> None:
    if fresh:
        shutil.rmtree(trial.run)
    processes = [start(training(trial.folder, "run")) for _ in range(count)]
    steps: list[int] = []
    for process in processes:
        output, _ = process.communicate(timeout=LIMIT)
        check_words(output)
        trained = list(records(output))
        steps += trained
        if process.returncode == 2:
            assert "another training writes there" in output and not trained, output[-2000:]
        else:
            assert process.returncode == 0 and (trained or "Nothing to do" in output), output[-2000:]
    assert sorted(steps) == list(range(1 if fresh else 5, STEPS + 1)), "each step once, by one of them"
    assert same_weights(trial.expected, trial.run, STEPS)
    lines = [line["iteration"] for line in read_run_log(trial.run / "metrics.jsonl") if line["kind"] == "log"]
    assert lines == list(range(1, STEPS + 1))
    assert not (trial.run / LOCK).exists() and not (trial.run / HOLDER).exists()
    note("concurrent starts", "one trained", count)
