"""Kill real runs at random moments: the final weights equal those of an undisturbed run bit for bit."""

import random
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from megatron.remoe.start.checkpoint_files import newest_complete
from megatron.remoe.start.run_lock import LOCK
from tests.entry import shared_entry
from tests.tiny_model import RELU
from tests.training_runs import TINY, assert_equal, figures, weights

KILLS, FEW_KILLS = 30, 3  # per test: KILLS in bulk tests, FEW_KILLS in the other one
LIMIT = 300.0  # seconds; longer is a hang
EVALUATED = "--log-interval 2 --eval-interval 6 --eval-iters 1 --split 80,10,10".split()
LAYOUTS = {
    "ReMoE": [],
    "one file per rank": ["--ckpt-format", "torch"],
    "saves at SIGTERM": ["--exit-signal-handler"],
    "keeps one checkpoint": ["--save-retain-interval", "1000"],
}


def make_flags(data: Path, folder: Path, steps: int, *more: str) -> list[str]:
    flags = f"--num-workers 2 --save-interval 2 --train-iters {steps} --lr-decay-iters {steps}".split()
    places = ["--data-path", str(data), "--save", str(folder), "--load", str(folder)]
    return [*TINY, *RELU, *places, *flags, *EVALUATED, *more]


def moment(folder: Path, number: int, kills: int, chance: random.Random) -> tuple[str, float]:
    """Return a kill's file and seconds (see `Entry.run`): at the start, in a save, between saves or at the end."""
    newest, steps = newest_complete(folder) or 0, 2 * kills
    if newest >= steps - 2 or number >= kills - kills // 7:
        # In the last save or the last evaluation: no step is left to train.
        return (str(folder / f"iter_{steps:07d}") if newest < steps else ""), chance.uniform(0, 1.5)
    kind = ("save", "start", "step")[number % 3]
    if kind == "start":
        return "", chance.uniform(0, 1.5)
    if kind == "save":
        return str(folder / f"iter_{newest + 2:07d}"), chance.uniform(0, 0.1)
    return str(folder / f"iter_{newest + 2:07d}" / "metadata.json"), chance.uniform(0, 0.3)


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors in either format, without random states: starting data loaders draws numbers."""
    files = sorted(folder.glob(f"iter_{iteration:07d}/mp_rank_*/*.pt"))
    if not files:
        return weights(folder, iteration)
    values, _ = tree_flatten_with_path([torch.load(file, weights_only=False) for file in files])
    named = ((keystr(path), value) for path, value in values)
    return {name: value for name, value in named if isinstance(value, torch.Tensor) and "rng" not in name}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("layout", "wanted"),
    [("ReMoE", FEW_KILLS), *(pytest.param(layout, KILLS, marks=pytest.mark.bulk) for layout in LAYOUTS)],
)
def test_killed_at_random_moments(layout: str, wanted: int, data: Path, tmp_path: Path) -> None:
    chance, kills, number, steps = random.Random(layout), 0, 0, 2 * wanted
    more, entry, expected, folder = LAYOUTS[layout], shared_entry(), tmp_path / "expected", tmp_path / "run"
    code, output = entry.run(make_flags(data, expected, steps, *more), limit=LIMIT)
    assert code == 0, output[-3000:]
    while kills < wanted:
        number += 1
        assert number < 4 * wanted, "most runs ended before their kill"
        asked = signal.SIGTERM if number % 3 == 0 else signal.SIGKILL
        kill = (asked, *moment(folder, kills, wanted, chance))
        code, output = entry.run(make_flags(data, folder, steps, *more), limit=LIMIT, kill=kill)
        at_sigterm = (0, 143) if asked == signal.SIGTERM and "--exit-signal-handler" in more else ()
        # SIGTERM can end a data loader process that is starting, before there is anything to save.
        if at_sigterm and "error: RuntimeError: DataLoader worker" in output:
            at_sigterm += (1,)
        else:
            assert "Traceback" not in output, output[-4000:]
        assert code in (0, -asked, *at_sigterm), f"{code} after {kill}: {output[-3000:]}"
        kills += code != 0
    code, output = entry.run(make_flags(data, folder, steps, *more), limit=LIMIT)
    assert code == 0, output[-3000:]
    assert_equal(tensors(folder, steps), tensors(expected, steps))
    lines, expected_lines = figures(folder, 2), figures(expected, 2)
    if "--exit-signal-handler" in more:  # it saves between two lines, so the next line's mean is over different steps
        for line in lines + expected_lines:
            line.pop("lm_loss" if line["kind"] == "log" else "", None)
    assert lines == expected_lines
    assert not (folder / LOCK).exists()
