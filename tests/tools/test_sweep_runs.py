"""Each routing and setting that the sweep offers trains a few steps, as its launch script starts it."""

import re
from pathlib import Path

import pytest

from tests.entry import Entry
from tools.common.tiny_model import BYTES
from tools.quickstart.models import SIZE
from tools.sweep import plan, settings, tiny

FLAGS = (*tiny.flags(SIZE, 3, {}), *BYTES, *"--global-batch-size 4 --eval-iters 1".split())
# The others are trained by test_sweep_training.py.
KINDS = [kind for kind in plan.PROTOCOLS if kind not in ("moe-warmup", plan.MATCHED, plan.POST_SOFTMAX)]
RUNS = plan.runs_of_figure(plan.COMPARED, {}, KINDS)
RUNS += plan.runs_of_figure(plan.COMPARED, {"granularity": (2,)}, [plan.POST_SOFTMAX])
RUNS += [
    run for name, axis in plan.AXES.items() for run in plan.runs_of_figure(name, {name: axis.values[-1:]}, None)[-1:]
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name.removeprefix("llama_182m_"))
def test_it_trains(run: plan.Run, entry: Entry, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_PATH", str(data))
    launch = plan.Launch(tmp_path, gpus_per_node=1, train_iters=3, micro_batch_size=2, flags=FLAGS)
    started = settings.would_start_with(launch, run, anywhere=False)
    words = [word for flag, values in started.items() for word in (flag, *values)]
    code, printed = entry.run(words, {"OMP_NUM_THREADS": "1"}, [])
    assert code == 0, printed[-3000:]
    assert re.search(r"loss at iteration 3 on validation set \| lm loss value: [2-9]\.", printed)
