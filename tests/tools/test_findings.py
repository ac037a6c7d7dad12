"""Test statistics of routing (intervals, mutual information, chance) against other ways to compute them."""

import math

import numpy
import pytest
import torch

from tools.models.analyze import findings
from tools.models.analyze.counts import WINDOW, Counts


def test_slope_and_its_interval() -> None:
    """The slope is numpy's. Half the interval is about 1.96 standard errors of a regression with even noise."""
    generator = numpy.random.default_rng(3)
    x = generator.normal(size=400)
    y = numpy.stack([2 - 0.3 * x + generator.normal(scale=0.5, size=400), numpy.ones(400)])
    (slope, low, high), flat = findings.slopes_with_intervals(torch.from_numpy(x), torch.from_numpy(y)).T.tolist()
    assert slope == pytest.approx(numpy.polyfit(x, y[0], 1)[0]) and low < -0.3 < high
    error = 0.5 / (x.std() * math.sqrt(400))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.2)
    assert flat == pytest.approx([0, 0, 0])


def test_information() -> None:
    """Two domains that share no expert have 1 bit, those with equal loads 0. A domain without pairs is ignored."""
    apart, alike, silent = [[8, 0], [0, 2]], [[3, 9], [1, 3]], [[3, 5], [0, 0]]
    routed = torch.tensor([apart, alike, silent]).transpose(0, 1)
    assert findings.information(routed).tolist() == pytest.approx([1, 0, 0])


def uneven(few: int, likely: list[float], seed: int) -> tuple[Counts, dict[str, float | None]]:
    """Count `few` sequences of one data set and 6400 of another; return the counts and the layer's specialization.

    Args:
        likely: relative probability that an expert gets all tokens of a sequence of the smaller data set. In the larger
            one, the four experts are equally likely.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = Counts([1], [few, 6400], length=WINDOW, experts=4, vocabulary=1)
    for domain, (number, weights) in enumerate(((few, likely), (6400, [1.0] * 4))):
        experts = torch.multinomial(torch.tensor(weights), number, replacement=True, generator=generator)
        gates = torch.nn.functional.one_hot(experts, 4)[:, None].expand(-1, WINDOW, -1).double()
        for start, part in zip(range(0, number, 800), gates.split(800), strict=True):
            ids = torch.zeros(part.shape[:2], dtype=torch.int64)
            counts.add(domain, start, ids, 0, part, torch.ones(ids.shape))
    found = findings.load(counts, ["few", "many"], 0.25, lambda token: None)
    return counts, found["specialization"][1]


def test_shuffled_domains_of_uneven_size() -> None:
    """Without a difference, about 1 of 20 draws is above the 95th percentile. A real difference is far above it."""
    alike = [uneven(64, [1.0] * 4, seed)[1] for seed in range(20)]
    assert sum(one["bits"] > one["shuffled_95"] for one in alike) <= 3
    mean, by_chance = (sum(one[key] for one in alike) / 20 for key in ("bits", "shuffled"))
    assert mean == pytest.approx(by_chance, rel=0.3)
    counts, apart = uneven(64, [1.0, 1.0, 1.0, 4.0], 1)
    assert apart["bits"] > 2 * apart["shuffled_95"]
    assert counts.part_sequences == 8 and int(counts.routed.sum()) == 6464 * WINDOW
    assert counts.routed[1].sum(dim=(1, 2)).tolist() == [8 * WINDOW] * 800 + [0] * 224
    _, few = uneven(7, [1.0] * 4, 1)
    assert few["bits"] and few["shuffled"] is None and few["shuffled_95"] is None, "no part of 8 sequences"


def test_small_loads_and_gates_of_one() -> None:
    """A layer can have fewer pairs than experts, with gates of 1 as in hash routing, or no pairs at all."""
    gates = torch.zeros(1, WINDOW, 8)
    gates[0, 0, 2] = gates[0, 1, 2] = gates[0, 5, 7] = 1.0
    counts, ids = Counts([1, 2], [1], WINDOW, experts=8, vocabulary=1), torch.zeros(1, WINDOW, dtype=torch.int64)
    for place, of_layer in enumerate((gates, torch.zeros_like(gates))):
        counts.add(0, 0, ids, place, of_layer, torch.ones(1, WINDOW))
    balance = findings.balance(counts, topk=1, ranks=1)["layers"]
    assert balance[1]["relative_load"] == pytest.approx([0, 0, 16 / 3, 0, 0, 0, 0, 8 / 3])
    sizes = findings.gates(counts)["layers"]
    assert [sizes[1][name] for name in ("mean", "percentile_10", "median", "percentile_90")] == [1.0] * 4
    assert sizes[2] is None and balance[2]["imbalance"] is None and balance[2]["dead"] == [*range(8)]


def test_chance_is_that_of_random_neighbours() -> None:
    """Chance equals a count over all pairs of tokens, and the formula for windows with two kinds of tokens."""
    generator = torch.Generator().manual_seed(2)
    ids, gates = torch.zeros(1, 400, dtype=torch.int64), torch.zeros(1, 400, 3)
    gates[0, torch.randperm(400, generator=generator)[:100], :2] = 0.5  # a quarter of the tokens has experts 0 and 1
    counts = Counts([1], [1], 400, experts=3, vocabulary=1)
    counts.add(0, 0, ids, 0, gates, torch.ones(1, 400))
    found = findings.neighbours(counts)["layers"][1]
    active = gates[0] > 0
    both = (active[:, None] & active[None]).sum() / 400**2
    assert found["common_by_chance"] == pytest.approx(float(both / active.sum(dim=1).double().mean()), rel=0.01)
    assert found["union_by_chance"] == pytest.approx(2 * (1 - 0.75**WINDOW))
    assert found["common"] == pytest.approx(found["common_by_chance"], abs=0.1)
    balance = findings.balance(counts, topk=1, ranks=1)["layers"][1]
    assert (balance["dead"], balance["inactive"]) == ([2], [2])
    assert findings.gates(counts)["layers"][1]["largest_gate"] == 0.5
