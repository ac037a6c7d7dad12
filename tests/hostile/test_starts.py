"""Start several trainings in one folder at once: one trains, the others say that it does, and nothing is mixed."""

import shutil
from pathlib import Path

import pytest

from megatron.remoe.preflight.run_lock import HOLDER, LOCK
from megatron.remoe.training.run_log import read_run_log
from tests.entry import shared_entry
from tests.hostile.conftest import Noted
from tests.hostile.trials import LIMIT, STEPS, Trial, check_words, same_weights, training
from tests.trainings import records

SCRIPT = Path(__file__).with_name("starting.py")


@pytest.mark.hostile
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fresh", [True, False], ids=["new folder", "resumes"])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
@pytest.mark.parametrize("number", range(3))
def test_concurrent_starts(count: int, fresh: bool, number: int, trial: Trial, note: Noted) -> None:
    if fresh:
        shutil.rmtree(trial.run)
    outputs = trial.folder / "outputs"
    outputs.mkdir()
    flags = [str(count), str(outputs), *training(trial.folder, "run")]
    code, told = shared_entry().run(flags, script=SCRIPT, limit=LIMIT)
    assert code == 0, told
    steps: list[int] = []
    for each, ended in enumerate(told.split()[-count:]):
        output = (outputs / str(each)).read_text()
        check_words(output)
        trained = list(records(output))
        steps += trained
        if ended == "2":
            assert "another training writes there" in output and not trained, output[-2000:]
        else:
            assert ended == "0" and (trained or "Nothing to do" in output), output[-2000:]
    assert sorted(steps) == list(range(1 if fresh else 5, STEPS + 1)), "each step once, by one of them"
    assert same_weights(trial.expected, trial.run, STEPS)
    lines = [line["iteration"] for line in read_run_log(trial.run / "metrics.jsonl") if line["kind"] == "log"]
    assert lines == list(range(1, STEPS + 1))
    assert not (trial.run / LOCK).exists() and not (trial.run / HOLDER).exists()
    note("concurrent starts", "one trained", count)
