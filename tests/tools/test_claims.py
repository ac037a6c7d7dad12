"""Test figures of docs/experiments.md that compare tables or runs: differences, FLOPs and spreads between seeds."""

import json
import re
from functools import cache
from statistics import fmean, stdev

import pytest

from tests.training_runs import REPOSITORY
from tools.experiments.arms import ARMS
from tools.experiments.results import Result, finished, read_results
from tools.experiments.tables import interval

COMPARE = REPOSITORY / "docs" / "compare"
TEXT = " ".join((REPOSITORY / "docs" / "experiments.md").read_text().split())
BOUNDED = "remoe-capped"
Arm = tuple[str, str, int]  # table, arm, steps


@cache
def read(path: str) -> dict[tuple[str, int], dict[int, Result]]:
    """Return the results of arms and steps by seed, without those of tuning."""
    results: dict[tuple[str, int], dict[int, Result]] = {}
    for run, result in finished(read_results(COMPARE / path)).items():
        if not run.is_tuning:
            results.setdefault((run.arm, run.steps), {})[run.seed] = result
    return results


def losses(table: str, arm: str, steps: int) -> dict[int, float]:
    return {seed: one.loss for seed, one in read(f"{table}/results.json")[arm, steps].items()}


def gaps(table: str, arm: str, steps: int) -> dict[int, float]:
    """Return the arm's losses minus those of ReMoE with the bound."""
    return subtract(losses(table, arm, steps), losses(table, BOUNDED, steps))


def subtract(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    return {seed: loss - other[seed] for seed, loss in one.items() if seed in other}


def show(differences: dict[int, float], sign: str = "") -> str:
    return interval([*differences.values()], sign, digits=3).replace("-", "−")


@pytest.mark.parametrize(("words", "small", "large", "steps"), [
    ("From 8 to 32 experts", "b1", "a1", 3600),
    ("From 32 to 128 experts", "a1", "b2", 3600),
    ("From k = 1 to 2", "a1", "c1", 3600),
    ("From G = 1 to 4", "b1", "c2", 3600),
    ("From hidden 128 to 256", "a1", "d256", 1200),
])  # fmt: skip
def test_what_a_larger_model_gains(words: str, small: str, large: str, steps: int) -> None:
    start = TEXT.index(words)
    for arm, name in (("moe", "top-k"), (BOUNDED, "ReMoE with the bound"), ("moe-hash", "hash")):
        one, more = losses(small, arm, steps), losses(large, arm, steps)
        gain = re.escape(show({seed: one[seed] - more[seed] for seed in (1, 2, 3)}))
        assert re.compile(f"{name} (gains )?{gain}").search(TEXT, start, start + 330)


@pytest.mark.parametrize(("words", "sign", "one", "other"), [
    ("changes with length ({})", "+", ("a2", "moe-hash", 12000), ("a1", "moe-hash", 3600)),
    ("E ({})", "+", ("b2", "moe-hash", 3600), ("a1", "moe-hash", 3600)),
    ("k ({})", "+", ("c1", "moe-hash", 3600), ("a1", "moe-hash", 3600)),
    ("128 to 256: {})", "+", ("d256", "moe-hash", 1200), ("a1", "moe-hash", 1200)),
    ("inconclusive ({})", "+", ("c2", "moe-hash", 3600), ("b1", "moe-hash", 3600)),
    ("(from 3,600 to 12,000: {}", "+", ("a2", "moe", 12000), ("a1", "moe", 3600)),
    ("normalized ReMoE is {} below top-k", "", ("a1", "moe", 3600), ("a3", "remoe-normalized", 3600)),
    ("and {} below hash", "", ("a1", "moe-hash", 3600), ("a3", "remoe-normalized", 3600)),
    ("normalized top-k is {} and", "", ("a1", "moe", 3600), ("a3", "moe-normalized", 3600)),
    ("and {} below them", "", ("a1", "moe-hash", 3600), ("a3", "moe-normalized", 3600)),
    ("normalized top-k is {} above", "", ("a3", "moe-normalized", 3600), ("a3", "remoe-normalized", 3600)),
])  # fmt: skip
def test_how_gaps_differ(words: str, sign: str, one: Arm, other: Arm) -> None:
    """Tables are compared by their arms' gaps to ReMoE with the bound, which ran in each."""
    assert words.format(show(subtract(gaps(*one), gaps(*other)), sign)) in TEXT


@pytest.mark.parametrize(("table", "experts"), [("b1", 8), ("b2", 128)])
def test_dense_beside_other_numbers_of_experts(table: str, experts: int) -> None:
    gap = show(subtract(losses("a1", "dense", 3600), losses(table, BOUNDED, 3600)), "+")
    assert f"beside {table} {gap}" in TEXT.replace("it is ", "")
    row = rf"^\| \[{experts}\].* \| 3,600 \| {re.escape(gap)} \|"
    assert re.search(row, (REPOSITORY / "README.md").read_text(), re.M)


def test_normalized_gates_after_12000_steps() -> None:
    found = {seed: one.loss for seed, one in read("a3/long.json")["remoe-normalized", 12000].items()}
    assert sorted(found) == [1, 2, 3] and f"normalized ReMoE has a loss of {show(found)} (" in TEXT
    for arm, words in (
        (BOUNDED, "{} below ReMoE with"),
        ("moe", "{} below top-k and"),
        ("moe-hash", "{} below hash, not"),
    ):
        assert words.format(show(subtract(losses("a2", arm, 12000), found))) in TEXT


def test_coefficients_of_the_auxiliary_loss() -> None:
    data = json.loads((COMPARE / "a1" / "aux-loss.json").read_text())
    low, high = (show(subtract(data[value], data["1e-2"]), "+") for value in ("1e-3", "1e-1"))
    assert len(data["1e-2"]) == 4 and f"1e-3 changes the loss by {low} and 1e-1 by {high}" in TEXT


def test_the_guard_of_each_expert() -> None:
    runs = read("b2/guard.json")[BOUNDED, 3600]
    guarded = {seed: one.loss for seed, one in runs.items()}
    change = show(subtract(guarded, losses("b2", BOUNDED, 3600)), "+")
    lead = show(subtract(guarded, losses("b2", "moe-hash", 3600)))
    assert sorted(guarded) == [1, 2, 3] and f"{change} from the same runs without it" in TEXT
    assert f"Hash is {lead} below the guarded runs" in TEXT
    layers = zip(*(one.inactive for one in runs.values()), strict=True)
    assert " and ".join(f"{fmean(layer):.0f}" for layer in layers) + " of 128 experts are inactive" in TEXT
    assert f"{fmean(one.experts_per_token or 0 for one in runs.values()):.2f} computed experts per token" in TEXT


def flops(one: Arm, other: Arm) -> str:
    """Return the ratio of FLOPs, mean over the seeds of both."""
    first, second = (read(f"{table}/results.json")[arm, steps] for table, arm, steps in (one, other))
    return f"{fmean(first[seed].flops / second[seed].flops for seed in first if seed in second):.3f}"


@pytest.mark.parametrize(("words", "table", "arms"), [
    ("top-k has used {}, hash and dense {}, ReMoE {} times", "a1", ["moe 3600", "dense 3600", "remoe 3600"]),
    ("(top-k {} times as many, hash {}, ReMoE {})", "a2", ["moe 12000", "moe-hash 12000", "remoe 12000"]),
    ("(top-k {} times as many, hash {})", "b2", ["moe 3600", "moe-hash 3600"]),
    ("normalized ReMoE has used {} and {} times", "a3", ["remoe-normalized 1200", "remoe-normalized 3600"]),
    ("DECO's router {} and {}", "a3", ["remoe-deco 1200", "remoe-deco 3600"]),
    ("expert threshold {} and {}", "a3", ["moe-expert-threshold 1200", "moe-expert-threshold 3600"]),
    ("the others {} and {}", "a3", ["moe-lossfree 1200", "moe-topp 3600"]),
])  # fmt: skip
def test_flops_relative_to_remoe_with_the_bound(words: str, table: str, arms: list[str]) -> None:
    pairs = [(table, arm, int(steps)) for arm, steps in map(str.split, arms)]
    assert words.format(*(flops(one, (table, BOUNDED, one[2])) for one in pairs)) in TEXT


def test_flops_of_two_experts_per_token() -> None:
    topk, bounded = (f"{float(flops(('c1', arm, 3600), ('a1', arm, 3600))):.2f}" for arm in ("moe", BOUNDED))
    assert f"{topk} times the FLOPs, ReMoE {bounded})" in TEXT


@pytest.mark.parametrize("arm", ["normalized", "deco"])
def test_equal_flops_of_table_a3(arm: str) -> None:
    """ReMoE with the bound has longer runs, of as many FLOPs as the arm's within 1 %."""
    longer, cells = read(f"a3/equal-flops-{arm}.json"), []
    for steps in (1200, 3600):
        near = {length: seeds for (_, length), seeds in longer.items() if steps < length < 2 * steps}
        bounded = {seed: one for seeds in near.values() for seed, one in seeds.items()}
        results = read("a3/results.json")[f"remoe-{arm}", steps]
        assert all(one.flops == pytest.approx(bounded[seed].flops, rel=0.01) for seed, one in results.items())
        gap = {seed: one.loss - bounded[seed].loss for seed, one in results.items()}
        cells += [show(gap, "+").replace("−", "-"), f"{min(near):,} to {max(near):,}"]
    assert f"| {ARMS[f'remoe-{arm}'].title} | {' | '.join(cells)} |" in TEXT


def test_spreads_between_seeds() -> None:
    late = {arm: stdev(gaps("a2", arm, 12000).values()) for arm in ("moe", "moe-hash", "remoe")}
    assert "vary by {moe:.3f} (top-k), {moe-hash:.3f} (hash) and {remoe:.3f} (ReMoE)".format(**late) in TEXT
    early = [stdev(gaps("a1", arm, steps).values()) for arm in ("moe", "moe-hash", "remoe") for steps in (1200, 3600)]
    assert f"those of a1 by {min(early):.3f} to {max(early):.3f}" in TEXT
