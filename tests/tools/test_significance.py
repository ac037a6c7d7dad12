"""Test the significance of loss differences against scipy's tests, values of statsmodels 0.15 and simulations."""

import math

import numpy as np
import pytest
from scipy import stats

from tools.experiments.significance import Difference, compare, holm, seeds_for_equivalence

ONE, OTHER = [0.11, 0.14, 0.10], [0.02, -0.01, 0.01]


def test_holm_is_that_of_statsmodels() -> None:
    """The expected values are those of statsmodels' multipletests([...], method="holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_row_is_a_paired_t_test() -> None:
    result = compare({"one": ONE}, margin=0.2)["one"]
    expected = stats.ttest_1samp(ONE, 0.0)
    assert result.p_different == pytest.approx(expected.pvalue)
    assert result.mean + result.half == pytest.approx(expected.confidence_interval().high)
    assert result.p_equivalent == pytest.approx(stats.ttest_1samp(ONE, 0.2, alternative="less").pvalue)


def test_rows_are_corrected_together() -> None:
    far = [0.5, 1.5, 3.0]
    result = compare({"one": [*ONE, *ONE], "other": [*OTHER, *OTHER], "far": far}, margin=0.05)
    assert result["one"].p_different == pytest.approx(3 * stats.ttest_1samp([*ONE, *ONE], 0.0).pvalue), "the lowest"
    assert result["far"].half == pytest.approx(compare({"far": far}, margin=1)["far"].half), "rows lend no spread"
    verdicts = [result[row].verdict for row in ("one", "other", "far")]
    assert verdicts == ["higher", "equivalent within 0.05", "inconclusive"]


def test_a_lower_loss_within_its_noise_is_no_worse() -> None:
    lower = [-0.09, 0.01, -0.11, -0.01]
    result = compare({"lower": lower, "higher": [-value for value in lower]}, margin=0.05)
    assert result["lower"].p_worse == pytest.approx(2 * stats.ttest_1samp(lower, 0.05, alternative="less").pvalue)
    assert [each.verdict for each in result.values()] == ["no worse within 0.05", "inconclusive"]


def test_one_value_shows_nothing() -> None:
    result = compare({"a": [-1.0], "c": ONE, "d": OTHER}, margin=0.1)["a"]
    assert result == Difference(-1.0, math.inf, 1.0, 1.0, 1.0, 0.1) and result.verdict == "one seed"


def test_seeds_for_equivalence_by_simulation() -> None:
    seeds = seeds_for_equivalence(0.03, 0.05)
    assert seeds is not None and seeds_for_equivalence(0.001, 0.06) is None and seeds_for_equivalence(0.01, 0.0) == 2

    def power(seeds: int) -> float:
        rows = np.random.default_rng(0).normal(0, 0.05, (20000, seeds))
        error = rows.std(axis=1, ddof=1) / np.sqrt(seeds)
        return float((np.abs(rows.mean(axis=1)) + stats.t.ppf(0.95, seeds - 1) * error < 0.03).mean())

    assert power(seeds - 2) < 0.8 < power(seeds + 1)


def test_values_without_any_spread() -> None:
    result = compare({"same": [0.0, 0.0], "other": [1.0, 1.0]}, margin=0.1)
    assert (result["same"].verdict, result["other"].verdict) == ("equivalent within 0.1", "higher")
