"""Kill real trainings at random moments: the final weights equal those of an undisturbed training bit for bit."""

import random
import signal
from pathlib import Path

import pytest

from megatron.remoe.start.checkpoint_files import saved_iterations
from megatron.remoe.start.run_lock import LOCK
from tests.data_sets import write_real_text
from tests.entry import shared_entry
from tests.hostile.conftest import Noted
from tests.hostile.trials import LIMIT, check_words, same_weights, training
from tests.trainings import figures

KILLS, FEW_KILLS = 30, 3  # per training; FEW_KILLS without bulk tests
EVALUATED = "--log-interval 2 --eval-interval 6 --eval-iters 1 --split 80,10,10".split()
LAYOUTS = {
    "ReMoE": [],
    "distributed optimizer": ["--use-distributed-optimizer"],
    "one file per rank": ["--ckpt-format", "torch"],
    "saves at SIGTERM": ["--exit-signal-handler"],
    "keeps one checkpoint": ["--save-retain-interval", "1000"],
    "no data loader processes": ["--num-workers", "0"],
    "bf16": ["--bf16"],
}


def moment(folder: Path, number: int, kills: int, chance: random.Random) -> tuple[str, float]:
    """Return the file that a kill waits for and a delay: at the start, in a save, between saves, or at the end."""
    newest, steps = max(saved_iterations(folder), default=0), 2 * kills
    if newest >= steps - 2 or number >= kills - kills // 7:
        # In the last save or the last evaluation, after which no step is left to train.
        return (str(folder / f"iter_{steps:07d}") if newest < steps else ""), chance.uniform(0, 1.5)
    kind = ("save", "start", "step")[number % 3]
    if kind == "start":
        return "", chance.uniform(0, 1.5)
    if kind == "save":
        return str(folder / f"iter_{newest + 2:07d}"), chance.uniform(0, 0.1)
    return str(folder / f"iter_{newest + 2:07d}" / "metadata.json"), chance.uniform(0, 0.3)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("layout", "wanted"),
    [("ReMoE", FEW_KILLS), *(pytest.param(layout, KILLS, marks=pytest.mark.bulk) for layout in LAYOUTS)],
)
def test_killed_at_random_moments(layout: str, wanted: int, tmp_path: Path, note: Noted) -> None:
    chance, kills, number, steps = random.Random(layout), 0, 0, 2 * wanted
    write_real_text(tmp_path / "text")
    flags = [*EVALUATED, *LAYOUTS[layout]]
    entry, folder = shared_entry(), tmp_path / "run"
    code, output = entry.run(training(tmp_path, "expected", *flags, steps=steps), limit=LIMIT)
    assert code == 0, output[-3000:]
    while kills < wanted:
        number += 1
        assert number < 4 * wanted, "most trainings ended before their kill"
        asked = signal.SIGTERM if number % 3 == 0 else signal.SIGKILL
        awaited, seconds = moment(folder, kills, wanted, chance)
        kill = (asked, awaited, seconds)
        code, output = entry.run(training(tmp_path, "run", *flags, steps=steps), limit=LIMIT, kill=kill)
        check_words(output)
        at_sigterm = (0, 143) if asked == signal.SIGTERM and "--exit-signal-handler" in flags else ()
        # SIGTERM kills a data loader process while it starts, before there is anything to save.
        at_sigterm += (1,) if at_sigterm and "error: RuntimeError: DataLoader worker" in output else ()
        assert code in (0, -asked, *at_sigterm), f"{code} after {kill}: {output[-3000:]}"
        kills += code != 0
    code, output = entry.run(training(tmp_path, "run", *flags, steps=steps), limit=LIMIT)
    check_words(output)
    assert code == 0, output[-3000:]
    assert same_weights(tmp_path / "expected", folder, steps)
    right, mine = figures(tmp_path / "expected", 2), figures(folder, 2)
    if "--exit-signal-handler" in flags:  # it saves between two lines, so the next line's mean is over other steps
        for line in right + mine:
            line.pop("lm_loss" if line["kind"] == "log" else "", None)
    assert mine == right
    assert not (folder / LOCK).exists()
    note("kills", f"survived ({layout})", kills)
