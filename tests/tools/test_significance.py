"""What tables of losses show, against scipy's own tests and values of statsmodels 0.15, and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from tools.compare.significance import Difference, compare, holm, seeds_for_equivalence, spread_of

ONE, OTHER = [0.11, 0.14, 0.10], [0.02, -0.01, 0.01]
UNEQUAL = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.1, 2.2], "c": [10.0, 30.0, 80.0, 99.0, 0.0]}


def test_holm_is_that_of_statsmodels() -> None:
    """multipletests([...], method="holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_one_row_is_a_paired_t_test() -> None:
    found = compare([{"one": ONE}], margin=0.2)["one"]
    expected = stats.ttest_1samp(ONE, 0.0)
    assert found.p_different == pytest.approx(expected.pvalue)
    assert found.mean + found.half == pytest.approx(expected.confidence_interval().high)
    assert found.p_equivalent == pytest.approx(stats.ttest_1samp(ONE, 0.2, alternative="less").pvalue)


def test_rows_of_a_group_lend_their_spread() -> None:
    """Two rows with 2 degrees of freedom each; another group has its own."""
    far = [0.5, 1.5, 3.0]
    spread = spread_of([ONE, OTHER])
    assert spread.freedom == 4 and spread.is_equal
    assert spread.deviation == pytest.approx(math.sqrt(np.mean([np.var(row, ddof=1) for row in (ONE, OTHER)])))
    found = compare([{"one": ONE, "other": OTHER}, {"far": far}], margin=0.05)
    error = spread.deviation / math.sqrt(3)
    assert found["one"].half == pytest.approx(2.7764 * error, rel=1e-3)
    assert found["one"].p_different == pytest.approx(3 * 2 * stats.t.sf(np.mean(ONE) / error, 4)), "the lowest of three"
    assert found["far"].p_different == pytest.approx(2 * stats.ttest_1samp(far, 0.0).pvalue)
    verdicts = [found[row].verdict for row in ("one", "other", "far")]
    assert verdicts == ["higher", "equivalent within 0.05", "inconclusive"]


def test_rows_with_other_spreads_are_not_pooled() -> None:
    spread = spread_of(UNEQUAL.values())
    assert spread.p == pytest.approx(stats.levene(*UNEQUAL.values(), center="median").pvalue) and not spread.is_equal
    found = compare([UNEQUAL], margin=5)
    for row, values in UNEQUAL.items():
        interval = stats.ttest_1samp(values, 0.0).confidence_interval()
        assert found[row].mean - found[row].half == pytest.approx(interval.low)
    assert found["c"].p_equivalent > 0.9 and found["c"].verdict == "inconclusive"


def test_too_few_values_show_nothing() -> None:
    found = compare([{"a": [-1.0]}], margin=0.1)["a"]
    assert found == Difference(-1.0, math.inf, 1.0, 1.0, 0.1) and found.verdict == "inconclusive"
    one_of_one = compare([{"a": [-1.0], "c": ONE, "d": OTHER}], margin=0.1)["a"]
    assert one_of_one.verdict == "lower", "other rows tell how much seeds differ"


def test_seeds_for_equivalence_by_simulation() -> None:
    seeds = seeds_for_equivalence(0.03, 0.05)
    assert seeds is not None and seeds_for_equivalence(0.001, 0.06) is None

    def found(seeds: int) -> float:
        rows = np.random.default_rng(0).normal(0, 0.05, (20000, seeds))
        error = rows.std(axis=1, ddof=1) / np.sqrt(seeds)
        return float((np.abs(rows.mean(axis=1)) + stats.t.ppf(0.95, seeds - 1) * error < 0.03).mean())

    assert found(seeds - 2) < 0.8 < found(seeds + 1)


def test_values_without_any_spread() -> None:
    found = compare([{"same": [0.0, 0.0], "other": [1.0, 1.0]}], margin=0.1)
    assert (found["same"].verdict, found["other"].verdict) == ("equivalent within 0.1", "higher")
