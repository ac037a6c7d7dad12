"""Train small grids: no run trains twice, each arm and setting trains, and a second interrupt ends all runs."""

import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from rich.console import Console

from tests.data_sets import write_small_corpus
from tests.entry import shared_entry
from tests.training_runs import records, wait_until
from tools.experiments import compare, grids
from tools.experiments.arms import ARMS, RATE, SETTINGS
from tools.experiments.results import finished, read_folder
from tools.experiments.run import Run, Text
from tools.runs.training_display import ShownTraining, TrainingDisplay
from tools.text.corpora.dataset import MIXED, make_text


def test_a_second_interrupt_ends_all_at_once(tmp_path: Path) -> None:
    """Two of three runs are training, and would take 90 seconds to end after SIGTERM. The third must not start."""
    shown = [ShownTraining(name, iterations=10, tokens_per_iteration=1, cost=1.0) for name in "abc"]
    lines = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(90)"
    output, command = io.StringIO(), [sys.executable, "-c", lines]

    def train(number: int) -> None:
        with (tmp_path / f"{number}.pid").open("w", buffering=1) as log:
            display.run(shown[number], command, os.environ, log)

    def interrupt_twice() -> None:
        pids = [tmp_path / f"{number}.pid" for number in (0, 1)]
        wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
        for _ in range(2):
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGINT)

    began, thread = time.monotonic(), threading.Thread(target=interrupt_twice)
    with (tmp_path / "lock").open("w") as lock, TrainingDisplay(Console(file=output), shown, lock) as display:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            display.run_all([partial(train, number) for number in range(3)], at_once=2)
    thread.join()
    assert time.monotonic() - began < 60
    assert "saving a checkpoint" in output.getvalue() and not (tmp_path / "2.pid").exists()
    for number in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{number}.pid").read_text().split()[0]), 0)
    output.write = Mock(side_effect=BrokenPipeError)  # type: ignore[method-assign]
    display.say("nobody reads this")


@contextmanager
def fork(_: object, words: list[str], environment: dict[str, str], *_rest: object) -> Iterator[SimpleNamespace]:
    """Replace `TrainingDisplay._start`: train in a fork of a process that has imported Megatron."""
    code, printed = shared_entry().run(words[2:], limit=240)
    yield SimpleNamespace(returncode=code, stdout=printed.splitlines(keepends=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small corpus."""
    folder = tmp_path_factory.mktemp("text") / MIXED
    write_small_corpus(folder / "corpus")
    return folder


def test_a_small_comparison(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    words = "--arms moe --experts 4 --train-iters 20 40 --seeds 1 --lr-factors 1 2 1e30 --warmups 4".split()
    words += "--tuning-iters 20 --tokens bytes --size 182m".split()
    words += ["--processes", "1", "--output-dir", str(tmp_path), "--text-dir", str(text)]
    words += "-- --seq-length 32 --max-position-embeddings 32".split()
    monkeypatch.setattr(TrainingDisplay, "_start", fork)
    assert compare.main(words) == 0
    printed = capsys.readouterr().out
    rows = finished(read_folder(tmp_path / "mixed"))  # without the runs that end at the third rate with NaN
    assert all(len(result.inactive) == 2 for result in rows.values()), "of top-k's layers too"
    tuning = [run for run in rows if run.is_tuning]
    assert len(tuning) == 4 and {run.seed for run in tuning} == {compare.TUNING_SEED}
    best = {arm: min((rows[run].loss, run.rate) for run in tuning if run.arm == arm)[1] for arm in ("moe", "remoe")}
    trained = {(run.arm, run.steps): (run, result) for run, result in rows.items() if not run.is_tuning}
    assert {run.arm: run.rate for run, _ in trained.values()} == best
    more = {steps for arm, steps in trained if arm == "moe"} - {20, 40}
    assert len(more) == 2, "ReMoE's dense start costs more"
    step = trained["moe", 20][1].flops / 20
    for steps, length in zip(sorted(more), (20, 40), strict=True):
        flops = [trained[arm][1].flops for arm in (("moe", steps), ("remoe", length))]
        assert flops[0] == pytest.approx(flops[1], abs=2.5 * step + 1)
    assert "| 20 | moe | " in printed and "verdict, equal FLOPs" in printed
    longer = tmp_path / "mixed" / trained["moe", 40][0].name / "train.log"
    assert min(records(longer.read_text())) == 16, "it goes on from step 15 of the shorter one"
    logs = [tmp_path / "mixed" / run.name / "checkpoints" / "metrics.jsonl" for run in rows]
    before = {path: path.stat().st_mtime_ns for path in logs}
    assert compare.main(words) == 0 and {path: path.stat().st_mtime_ns for path in before} == before
    for steps in more:
        shutil.rmtree(tmp_path / "mixed" / trained["moe", steps][0].name)
    rounds = iter([{"a tuning run": 1}, {}, {"ends with NaN": 16}, {}])
    monkeypatch.setattr(grids, "execute", lambda *_: next(rounds))
    assert compare.main([word.replace(str(tmp_path), f"{tmp_path}/none") for word in words[:-5]]) == 1
    assert compare.main(words) == 1 and not [*rounds], "other runs are still trained to equal FLOPs"


# The quickstart's test and test_a_small_comparison train these arms; the latter also varies the learning rate.
TRAINED = {"dense", "moe", "remoe", "remoe-capped"}
# Other arms that train with a setting.
VARIED = {"remoe-unbalanced": "l1-init", "remoe-normalized": "l1-multiplier", "moe-warmup": "warmup-length"}
VARIED |= {"moe-sigmoid": "aux-coeff", "moe-lossfree": "gate"}


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in TRAINED])
def test_each_arm_and_each_setting_trains(arm: str, text: Path) -> None:
    assert {*VARIED.values(), RATE} == SETTINGS.keys()
    run, known = Run(arm), Text.read(make_text(text, MIXED))
    if arm in VARIED:
        run = run.vary(VARIED[arm], SETTINGS[VARIED[arm]].values[-1])
    few = "--exit-interval 2 --eval-iters 1 --seq-length 32 --max-position-embeddings 32 --log-interval 1".split()
    code, printed = shared_entry().run([*run.tiny_flags(known, few)], limit=120)
    assert code == 0, printed[-3000:]
    assert list(records(printed)) == [1, 2]
