"""Routings beside each other: intervals, tuning setting by setting, and a comparison of a few steps for real."""

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.trainings import REPOSITORY, finish
from tools.common.flags import parse
from tools.compare import command, recipes, table
from tools.compare.recipes import Recipe
from tools.sweep import plan, tiny
from tools.sweep.command import parse_arguments
from tools.sweep.run_log import Outcome, read_outcome

GIVEN = parse(tiny.flags(10, {}))


def test_intervals_by_hand() -> None:
    assert table.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert table.interval([1.5]) == (1.5, math.inf)
    losses = {
        "dense": {1: 1.60, 2: 1.70, 3: 1.62},
        "remoe": {1: 1.5, 2: 1.6, 3: 1.5},
        "moe": {1: 1.52, 2: 1.58, 9: 1.0},
    }
    assert table.differences(losses, "moe") == pytest.approx([0.02, -0.02])
    assert list(table.verdicts(losses)) == ["dense: ReMoE is lower", "top-k, softmax: cannot be told"]
    lines = table.markdown(losses, {}).splitlines()
    assert lines[2] == "| dense | 1.640 ± 0.131 | +0.107 ± 0.029 | 3 |"
    assert lines[3] == "| ReMoE | 1.533 ± 0.143 |  | 3 |"
    alone = table.markdown({"remoe": {1: 1.5}, "dense": {1: 1.6}}, {}).splitlines()
    assert alone[2:] == ["| ReMoE | 1.500 |  | 1 |", "| dense | 1.600 | +0.100 | 1 |"]


class Trainings:
    """Stands for scripts/sweep.sh, with losses that are the sum of what each setting costs."""

    def __init__(self, costs: dict[object, float]) -> None:
        self.costs, self.calls = costs, 0

    def __call__(self, options: Sequence[str], flags: Sequence[str]) -> recipes.Found:
        args = parse_arguments(["--tiny", *options, "--", *flags])
        values = {name: given for name in (*plan.VALUES, *plan.AXES) if (given := getattr(args, name)) is not None}
        self.calls += 1
        return {run: self.outcome(run, flags) for run in plan.plan(args.figures, values, args.routings)}

    def outcome(self, run: plan.Run, flags: Sequence[str]) -> Outcome:
        words = [*run.flags(GIVEN), *flags]
        told = [run.kind, ("G", run.granularity), *zip(words, words[1:], strict=False)]
        return Outcome(10, 10, validation_loss=2.0 + sum(self.costs.get(each, 0.0) for each in told))


def test_tuning_takes_what_is_best_of_each_setting() -> None:
    gate, rate = ("--moe-router-topk-scaling-factor", "4"), ("--lr", "0.008")
    train = Trainings(
        {"moe-sigmoid": -0.1, ("G", 2): -0.05, gate: -0.02, rate: -0.03, ("--moe-aux-loss-coeff", "0.1"): 0.2}
    )
    found = recipes.tune(recipes.TUNED["tuned-moe"], train, GIVEN)
    assert found == Recipe("moe-sigmoid", 2, (*gate, *rate, "--min-lr", "0.0008")) and train.calls == 3
    assert str(found) == f"top-k, sigmoid, k = G = 2, {' '.join(found.flags)}"

    # Nothing is better than the routing as it is: no further training.
    train = Trainings({"moe-lossfree": -0.1} | {("--lr", rate): 1.0 for rate in ("0.002", "0.008", "0.016")})
    train.costs |= {("--moe-router-topk-scaling-factor", factor): 0.1 for factor in "248"}
    assert recipes.tune(recipes.TUNED["tuned-moe"], train, GIVEN) == Recipe("moe-lossfree") and train.calls == 2

    # Two that are good alone and bad together.
    train = Trainings({("--lr", "0.008"): -0.1})
    assert recipes.tune(recipes.TUNED["tuned-dense"], train, GIVEN).flags == ("--lr", "0.008", "--min-lr", "0.0008")
    assert recipes.tune(recipes.TUNED["tuned-remoe"], train, GIVEN).kind == "remoe"


def test_two_settings_that_do_not_go_together() -> None:
    class Opposed(Trainings):
        def outcome(self, run: plan.Run, flags: Sequence[str]) -> Outcome:
            worse = 5.0 if "--lr" in flags and "--moe-aux-loss-coeff" in flags else 0.0
            loss = super().outcome(run, flags).validation_loss
            assert loss is not None
            return Outcome(10, 10, validation_loss=loss + worse)

    train = Opposed({("--lr", "0.008"): -0.1, ("--moe-aux-loss-coeff", "0.001"): -0.2, "moe": -1.0})
    assert recipes.tune(recipes.TUNED["tuned-moe"], train, GIVEN).flags == ("--moe-aux-loss-coeff", "0.001")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1233"], "--seeds 1233: settings are chosen with it"),
        (["--seeds", *map(str, range(11))], "0': give a whole number of at least 1"),
        (["--seeds", *map(str, range(1, 12))], "--seeds: 11 are more than the 10"),
        (["--rows", "best"], "invalid choice: 'best'"),
    ],
)
def test_bad_values_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def start(output: Path) -> subprocess.Popen[str]:
    words = "--corpora mixed --rows remoe dense --seeds 1 2 --train-iters 12 --processes 2 --output-dir".split()
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools" / "compare"), *words, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_trains_stops_and_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path)
    logs = [tmp_path / "mixed" / "dense" / f"seed-{seed}" / "llama_182m_dense_ffn4" / "train.log" for seed in (1, 2)]
    while process.poll() is None and not all(log.exists() for log in logs):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, code=130)
    assert "stopped; the same command goes on from here" in errors

    output, _ = finish(start(tmp_path), code=0)
    assert "mixed: ReMoE, seed 2: " in output and "(4/4, 0:00 left)" in output
    found = json.loads((tmp_path / "mixed.json").read_text())
    by_seed = {}
    for row, name in (("dense", "dense_ffn4"), ("remoe", "remoe_e8g1")):
        outcomes = [read_outcome(tmp_path / "mixed" / row / f"seed-{seed}" / f"llama_182m_{name}") for seed in (1, 2)]
        by_seed[row] = [outcome.test_loss for outcome in outcomes if outcome and outcome.test_loss]
        assert list(found["losses"][row].values()) == by_seed[row] and 3 < min(by_seed[row]) < max(by_seed[row]) < 5
        assert all(outcome and outcome.validation_loss != outcome.test_loss for outcome in outcomes)
    assert f"| dense | {statistics.fmean(by_seed['dense']):.3f} ± " in output
