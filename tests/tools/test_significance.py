"""What tables of losses show, against values of statsmodels 0.15 and of scipy's own tests, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from tools.compare.significance import Difference, differences, holm, seeds_for_equivalence, spread_of

ONE, OTHER = [1.61, 1.72, 1.63], [1.50, 1.58, 1.52]
UNEQUAL = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.1, 2.2], "c": [10.0, 30.0, 80.0, 99.0, 0.0]}


def test_holm_is_that_of_statsmodels() -> None:
    """multipletests([...], method="holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_two_rows_are_a_t_test() -> None:
    (found,) = differences({"one": ONE, "other": OTHER}, [("one", "other")], margin=0.3)
    expected = stats.ttest_ind(ONE, OTHER)
    assert found.mean == pytest.approx(0.12)
    assert found.p_different == pytest.approx(expected.pvalue)
    assert found.mean + found.half == pytest.approx(expected.confidence_interval().high)
    assert found.p_equivalent == pytest.approx(0.006139081772)  # statsmodels: ttost_ind(one, other, -0.3, 0.3)


def test_further_rows_lend_their_spread() -> None:
    """Four rows with 2 degrees of freedom each: 8, and the mean of their variances."""
    rows = {"one": ONE, "other": OTHER, "third": [2.0, 2.1, 2.05], "fourth": [3.0, 3.1, 3.05]}
    spread = spread_of(rows.values())
    assert spread.freedom == 8 and spread.is_equal
    assert spread.deviation == pytest.approx(math.sqrt(np.mean([np.var(row, ddof=1) for row in rows.values()])))
    pairs = [("one", "other"), ("third", "fourth")]
    found, far = differences(rows, pairs, margin=0.3)
    error = spread.deviation * math.sqrt(2 / 3)
    assert found.half == pytest.approx(2.306 * error, rel=1e-3)
    assert found.p_different == pytest.approx(2 * stats.t.sf(0.12 / error, 8)), "the larger of two: times 1"
    assert far.p_different == pytest.approx(2 * 2 * stats.t.sf(1.0 / error, 8))
    assert (far.verdict, found.verdict) == ("lower", "equivalent within 0.3")


def test_rows_with_other_spreads_are_not_pooled() -> None:
    spread = spread_of(UNEQUAL.values())
    assert spread.p == pytest.approx(stats.levene(*UNEQUAL.values(), center="median").pvalue) and not spread.is_equal
    found = differences(UNEQUAL, [("a", "c"), ("b", "c")], margin=5)
    expected = [stats.ttest_ind(UNEQUAL[row], UNEQUAL["c"], equal_var=False) for row in "ab"]
    for one, other in zip(found, expected, strict=True):
        assert one.mean - one.half == pytest.approx(other.confidence_interval().low)
    assert [one.p_different for one in found] == pytest.approx([2 * expected[0].pvalue] * 2)
    assert found[0].p_equivalent == 1.0 and found[0].verdict == "inconclusive"


def test_too_few_losses_show_nothing() -> None:
    (found,) = differences({"a": [1.0], "b": [2.0]}, [("a", "b")], margin=0.1)
    assert found == Difference(-1.0, math.inf, 1.0, 1.0, 0.1) and found.verdict == "inconclusive"
    one_of_one = differences({"a": [1.0], "b": [2.0], "c": ONE, "d": OTHER}, [("a", "b")], margin=0.1)
    assert one_of_one[0].verdict == "lower", "other rows tell how much seeds differ"


def test_seeds_for_equivalence_by_simulation() -> None:
    """32 seeds find two equal rows equivalent in 80 % of all cases, 28 in less."""
    assert seeds_for_equivalence(0.03, 0.04) == 32 and seeds_for_equivalence(0.001, 0.06) is None

    def found(seeds: int) -> float:
        rows = np.random.default_rng(0).normal(0, 0.04, (20000, 2, seeds))
        error = np.sqrt(rows.var(axis=2, ddof=1).mean(axis=1) * 2 / seeds)
        apart = np.abs(np.diff(rows.mean(axis=2), axis=1)[:, 0])
        return float((apart + stats.t.ppf(0.95, 2 * seeds - 2) * error < 0.03).mean())

    assert found(28) < 0.77 and 0.79 < found(32) < 0.84


def test_losses_without_any_spread() -> None:
    same, other = differences({"a": [1, 1], "b": [1, 1], "c": [2, 2]}, [("a", "b"), ("a", "c")], margin=0.1)
    assert (same.verdict, other.verdict) == ("equivalent within 0.1", "lower")
