"""Routings beside each other: intervals, tuning setting by setting, and a comparison of a few steps for real."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.trainings import REPOSITORY, finish
from tools.common.errors import ToolError
from tools.common.flags import parse
from tools.compare import command, recipes, router_figures, table
from tools.compare.recipes import Recipe
from tools.compare.saved_results import SavedResults
from tools.compare.table import Result
from tools.quickstart.models import SIZE
from tools.sweep import plan, tiny
from tools.sweep.command import parse_arguments, planned
from tools.sweep.run_log import Outcome, read_outcome

GIVEN = parse(tiny.flags(SIZE, 10, {}))


def of_losses(losses: dict[str, dict[int, float]]) -> dict[str, dict[int, Result]]:
    return {row: {seed: Result(loss) for seed, loss in of.items()} for row, of in losses.items()}


def test_intervals_by_hand() -> None:
    assert table.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / math.sqrt(3), rel=1e-3))
    assert table.interval([1.5]) == (1.5, math.inf)
    results = of_losses(
        {"dense": {1: 1.60, 2: 1.70, 3: 1.62}, "remoe": {1: 1.5, 2: 1.6, 3: 1.5}, "moe": {1: 1.52, 2: 1.58, 9: 1.0}}
    )
    assert table.differences(results, "moe") == pytest.approx([0.02, -0.02])
    found = [*table.verdicts(results, margin=0.5)]
    assert "6 degrees of freedom" in found[0] and found[0].startswith("seeds differ by 0.19")
    assert "dense against ReMoE: +0.107 ± 0.379" in found[1] and found[1].endswith("equivalent within 0.5")
    assert len(found) == 4 and found[3].startswith("seeds per row to see a difference of 0.5: 5;")
    assert not [*table.verdicts(of_losses({"dense": {1: 1.6}, "remoe": {1: 1.5}}), margin=0.5)]
    lines = table.markdown(results, {}).splitlines()
    assert lines[0] == "|  | loss | above ReMoE | seeds |"
    assert lines[2] == "| dense | 1.640 ± 0.131 | +0.107 ± 0.029 | 3 |"
    assert lines[3] == "| ReMoE | 1.533 ± 0.143 |  | 3 |"
    same = table.markdown(of_losses({"remoe": {1: 1.5}, "tuned-remoe": {1: 1.49999}}), {}).splitlines()
    assert same[3] == "| ReMoE, tuned | 1.500 | +0.000 | 1 |"
    alone = table.markdown(of_losses({"remoe": {1: 1.5}, "dense": {1: 1.6}}), {}).splitlines()
    assert alone[2:] == ["| ReMoE | 1.500 |  | 1 |", "| dense | 1.600 | +0.100 | 1 |"]


def test_runs_of_a_figure_have_the_remoe_beside_them() -> None:
    words = "--rows remoe --figures experts l1-init --experts 8 16 --routings dense moe remoe --l1-inits 1e-8 1e-4"
    args = command.parse_arguments(words.split())
    runs = ["remoe_e8g1_init0.0001"]
    assert set(args.rows) == {"remoe", "dense", "dense_ffn32", "moe", "moe_e16g1", "remoe_e16g1", *runs}
    assert [recipes.reference_of(row) for row in ("moe_e16g1", *runs)] == ["remoe_e16g1", "remoe"]
    results = {
        "remoe": {1: Result(1.5, 60, 0.01, 0.08), 2: Result(1.6, 70, 0.02, 0.16)},
        runs[0]: {1: Result(1.4, 40), 2: Result(1.6)},
        "moe_e16g1": {1: Result(1.4, None, 0.03, 0.48)},
        "remoe_e16g1": {1: Result(1.3)},
    }
    lines = table.markdown(results, {}).splitlines()
    assert lines[0] == "|  | loss | above ReMoE | S settled | flip rate | flips per token | seeds |"
    assert lines[2] == "| ReMoE | 1.550 ± 0.635 |  | 60 | 0.0150 ± 0.0635 | 0.1200 ± 0.5082 | 2 |"
    assert lines[3] == "| ReMoE, λ₀ = 0.0001 | 1.500 ± 1.271 | -0.050 ± 0.635 | 40 (1 of 2) |  |  | 2 |"
    assert lines[4] == "| top-k, softmax, E = 16 | 1.400 | +0.100 |  | 0.0300 | 0.4800 | 1 |"


def test_routers_beside_each_other_by_layer() -> None:
    def result(bits: list[float | None], slope: float | None) -> Result:
        names = (*router_figures.COLUMNS, router_figures.BITS, "inactive")
        others: dict[str, list[float | None]] = {name: [1.0, 2.0] for name in names}
        return Result(1.5, routing=others | {router_figures.BITS: bits, "for a tenfold frequency": [slope, None]})

    results = {
        "moe": {1: result([0.1, 0.2], None), 2: result([0.3, 0.2], None), 3: Result(1.4)},
        "remoe": {1: result([0.2, 0.2], -0.1), 2: result([0.2, 0.1], -0.3), 3: Result(1.4)},
        "dense": {1: Result(1.6)},
    }
    lines = router_figures.markdown(results).splitlines()
    ones = "1.000 ± 0.000 | 1.000 ± 0.000 |  | 1.000 ± 0.000"
    assert lines[2] == f"| top-k, softmax | 1 | {ones} | 0.2000 ± 1.2706 | +0.0000 ± 1.2706 | 1, 1 |"
    assert "| +0.0500 ± 0.6353 | 2, 2 |" in lines[3] and "| -0.200 ± 1.271 | " in lines[4] and len(lines) == 6
    analyzed = [row for row in recipes.OTHERS if router_figures.is_analyzed(recipes.recipe_of(row).run)]
    assert analyzed == ["moe-sigmoid", "moe-unbalanced", "moe-warmup", "moe-hash"]
    assert not router_figures.is_analyzed(recipes.recipe_of("dense").run)


@pytest.mark.parametrize(
    "run", plan.plan((*plan.FIGURES, plan.COMPARED, *plan.AXES), {}, None), ids=lambda run: run.name
)
def test_a_row_trains_its_run(run: plan.Run) -> None:
    row = recipes.row_of(run)
    recipe = recipes.recipe_of(row)
    assert recipe.run == run
    planned_runs = planned(parse_arguments(["--tiny", *recipe.options()]))
    assert run in planned_runs and len(planned_runs) <= 2, "one more where it is needed, or comes with it"


def test_an_analysis_is_of_the_newest_checkpoint(tmp_path: Path) -> None:
    last, newest = tmp_path / "analysis" / "gates.json", tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert not router_figures.has_analysis(tmp_path)
    for path in (newest, last):
        path.parent.mkdir()
        path.touch()
        os.utime(path, (5, 5))
    assert router_figures.has_analysis(tmp_path)
    os.utime(newest, (6, 6))
    assert not router_figures.has_analysis(tmp_path)


class Trainings:
    """Stands for scripts/sweep.sh, with losses that are the sum of what each setting costs."""

    def __init__(self, costs: dict[object, float]) -> None:
        self.costs, self.calls = costs, 0
        self.found: dict[plan.Run, Outcome] = {}

    def __call__(self, options: Sequence[str], flags: Sequence[str]) -> recipes.Found:
        args = parse_arguments(["--tiny", *options, "--", *flags])
        self.calls += 1
        found = {run: self.outcome(run, flags) for run in planned(args)}
        if flags:  # in a folder of their own
            return found
        self.found |= found
        return self.found

    def outcome(self, run: plan.Run, flags: Sequence[str]) -> Outcome:
        words = [*run.flags(GIVEN), *flags]
        told = [run.kind, ("G", run.granularity), *zip(words, words[1:], strict=False)]
        told += [frozenset({RATE, AUX})] * ({RATE, AUX} <= {*words})
        return Outcome(10, 10, validation_loss=2.0 + sum(self.costs.get(each, 0.0) for each in told))


GATE, RATE, AUX = "--moe-router-topk-scaling-factor", "--lr", "--moe-aux-loss-coeff"
# Everything but the middle is bad, so that no tuning goes past the ends.
ENDS = {(GATE, "0.5"): 1.0, (GATE, "8"): 1.0, (AUX, "0.0001"): 1.0, (AUX, "0.1"): 1.0}
ENDS |= {(RATE, "0.002"): 1.0, (RATE, "0.016"): 1.0}


def test_tuning_takes_what_is_best_of_each_setting() -> None:
    costs = {"moe-sigmoid": -0.1, ("G", 2): -0.05, (GATE, "4"): -0.02, (RATE, "0.008"): -0.03, (AUX, "0.001"): 0.2}
    train = Trainings(ENDS | costs)
    found = recipes.tune(recipes.TUNED["tuned-moe"], train, GIVEN)
    sigmoid = plan.Run("182m", "moe", 8, 2, protocol="sigmoid")
    assert found == Recipe(sigmoid, (GATE, "4", RATE, "0.008", "--min-lr", "0.0008"))
    assert train.calls == 1 + 3 + 1, "routings, each setting, what was best of each together"
    assert recipes.tune(recipes.TUNED["tuned-moe"], train, GIVEN) == found, "all runs are there already"
    assert str(found) == f"top-k, sigmoid, k = G = 2, {' '.join(found.flags)}"

    # Nothing is better than a routing as it is.
    costs = ENDS | {"moe-lossfree": -0.1, (GATE, "2"): 0.1, (GATE, "4"): 0.1, (RATE, "0.008"): 0.1}
    for row, kind in (("tuned-moe", "moe-lossfree"), ("tuned-dense", "dense"), ("tuned-remoe", "remoe")):
        assert recipes.tune(recipes.TUNED[row], Trainings(costs), GIVEN) == recipes.recipe_of(kind)


def test_tuning_goes_past_the_ends_of_a_setting() -> None:
    better = {(GATE, value): -0.1 * place for place, value in enumerate(("2", "4", "8", "16", "32", "64"))}
    train = Trainings(ENDS | better | {(AUX, "1e-05"): -0.1, (AUX, "1e-06"): 1.0, (AUX, "0.0001"): -0.05})
    found = recipes.tune(recipes.TUNED["tuned-moe"], train, GIVEN)
    assert found.flags == (AUX, "1e-05", GATE, "32"), "two values past the end, and no more"


def test_two_settings_that_do_not_go_together() -> None:
    costs = {(RATE, "0.008"): -0.1, (AUX, "0.001"): -0.2, "moe": -1.0, (GATE, "2"): 0.1, (GATE, "4"): 0.1}
    opposed = Trainings(ENDS | costs | {frozenset({RATE, AUX}): 5.0})
    assert recipes.tune(recipes.TUNED["tuned-moe"], opposed, GIVEN).flags == (AUX, "0.001")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1233"], "--seeds 1233"),
        (["--seeds", *map(str, range(11))], "0': give a whole number of at least 1"),
        (["--rows", "best"], "invalid choice: 'best'"),
        ("--figures l1-init --routings moe".split(), "no such routing has this setting"),
    ],
)
def test_bad_values_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_results_of_earlier_calls_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"

    def add(inputs: str, losses: dict[str, dict[int, float]], tuned: dict[str, Recipe]) -> SavedResults:
        kept = SavedResults.read(path, inputs)
        kept.add(of_losses(losses), tuned)
        kept.write(path)
        assert SavedResults.read(path, inputs) == kept
        return kept

    tuned = {"tuned-moe": Recipe(plan.Run("182m", "moe", 8, 2), (RATE, "0.008"))}
    add("1200", {"dense": {2: 1.5}, "tuned-moe": {2: 1.4}}, tuned)
    kept = add("1200", {"dense": {1: 1.6, 2: 1.5}, "remoe": {1: 1.3}}, {})
    assert kept.results == of_losses({"dense": {1: 1.6, 2: 1.5}, "tuned-moe": {2: 1.4}, "remoe": {1: 1.3}})
    assert kept.tuned == tuned and [*kept.of(["remoe", "moe"])] == ["remoe"]
    assert f"| top-k, tuned: top-k, softmax, k = G = 2, {RATE} 0.008 | 1.400 |" in table.markdown(kept.results, tuned)
    seen = {"domain bits": [0.1, None]}
    SavedResults("1200", results={"dense": {2: Result(1.5, routing=dict(seen))}}).write(path)
    assert add("1200", {"dense": {2: 1.5}}, {}).results == {"dense": {2: Result(1.5, routing=dict(seen))}}
    before = path.read_bytes()
    with pytest.raises(ToolError, match="mixed.json .*--train-iters"):
        add("7", {"dense": {1: 3.0}}, {})
    assert path.read_bytes() == before


def start(output: Path, rest: str = "--rows dense --seeds 2 1") -> subprocess.Popen[str]:
    words = ["--output-dir", str(output), *"--corpora mixed --train-iters 12 --processes 2".split(), *rest.split()]
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tools" / "compare"), *words],
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
    assert "mixed: dense, seed 2: " in output and "(2/2, 0:00 left)" in output
    outcomes = [read_outcome(log.parent) for log in logs]
    losses = [outcome.test_loss for outcome in outcomes if outcome and outcome.test_loss]
    assert 3 < min(losses) < max(losses) < 5
    assert all(outcome and outcome.validation_loss != outcome.test_loss for outcome in outcomes)
    found = json.loads((tmp_path / "mixed.json").read_text())
    assert [of["loss"] for of in found["results"]["dense"].values()] == losses
    assert f"| dense | {statistics.fmean(losses):.3f} ± " in output

    (tmp_path / "mixed.json").unlink()  # of other flags
    flags = "--moe-router-topk-scaling-factor 2"  # has no meaning with ReLU routing, and is refused
    output, errors = finish(start(tmp_path, f"--rows remoe moe --seeds 3 --analyze -- {flags}"), code=1)
    assert "mixed: ReMoE, seed 3: failed (1/2, " in output and "mixed: top-k, softmax, seed 3: " in output
    assert "1 failed; the same command tries them again.\nmixed: ReMoE, seed 3: " in errors
    assert "| top-k, softmax | " in output, "the others go on"
    assert "mixed: top-k, softmax, seed 3: tools/analyze (1/1, 0:00 left)" in output
    bits = json.loads((tmp_path / "mixed.json").read_text())["results"]["moe"]["3"]["routing"]["domain bits"]
    assert (
        len(bits) == 2 and "| top-k, softmax | 2 | 1.000 | 0.000 |  | " in output and f" | {bits[1]:.4f} | " in output
    )
