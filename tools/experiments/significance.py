"""Test the differences in a table of losses: intervals, corrected p-values, equivalence, and the seeds needed.

Two arms with the same seed see the same text in the same order, so paired t-tests compare them seed by seed. Spreads
are not pooled: rows of a table share the reference's losses, which makes pooled intervals too narrow. Holm's
correction holds the probability of any false claim of a kind (different, equivalent, no worse) in the table at 5 %.
"""

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
MARGIN = 0.01  # a smaller difference of losses counts as none
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """The mean difference of two arms, with p-values corrected by Holm for all comparisons of the table.

    Attributes:
        mean: the arm's minus its reference's, in the unit of the losses.
        half: half of the 95 % interval, not corrected for other comparisons; infinite with one seed.
        p_different: under the hypothesis that the arms are equal.
        p_equivalent: under the hypothesis that they differ by at least `margin` (TOST).
        p_worse: under the hypothesis that the arm is worse by at least `margin` (the upper one of TOST's two tests).
        margin: the largest difference that counts as none.
    """

    mean: float
    half: float
    p_different: float
    p_equivalent: float
    p_worse: float
    margin: float

    @property
    def verdict(self) -> str:
        """Return the first verdict that holds: one seed, equivalent, higher, lower, no worse; else inconclusive."""
        if not math.isfinite(self.half):
            return "one seed"
        if self.p_equivalent < LEVEL:
            return f"equivalent within {self.margin:g}"
        if self.p_different < LEVEL:
            return "higher" if self.mean > 0 else "lower"
        if self.p_worse < LEVEL:
            return f"no worse within {self.margin:g}"
        return "inconclusive"


def compare[Row: Hashable](rows: Mapping[Row, Sequence[float]], margin: float) -> dict[Row, Difference]:
    """Compare arms with their references, given the differences by seed; up to `margin` they count as none."""
    different = holm([_p(values, 0.0, "two-sided") for values in rows.values()])
    worse = [_p(values, margin, "less") for values in rows.values()]
    better = [_p(values, -margin, "greater") for values in rows.values()]
    corrected = zip(different, holm([*map(max, worse, better)]), holm(worse), strict=True)
    differences = zip(rows.items(), corrected, strict=True)
    return {row: Difference(float(np.mean(values)), half_width(values), *p, margin) for (row, values), p in differences}


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean by Student's t; infinite for one value."""
    return float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)) if len(values) > 1 else math.inf


def _p(values: Sequence[float], mean: float, alternative: str) -> float:
    """Return the p-value of a t-test; 1 for one value, and for equal values at `mean`."""
    with warnings.catch_warnings(action="ignore"):  # SciPy warns of equal values
        p = float(stats.ttest_1samp(values, mean, alternative=alternative).pvalue)
    return 1.0 if math.isnan(p) else p


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down method for that many tests."""
    order = np.argsort(values)
    steps = np.asarray(values, float)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def seeds_for_equivalence(margin: float, deviation: float, comparisons: int = 1) -> int | None:
    """Return how many seeds it takes to find two equal arms equivalent with a probability of 80 %.

    Args:
        margin: largest difference that counts as none, in the unit of the losses.
        deviation: standard deviation of two equal arms' difference with one seed.
        comparisons: their number in the table; the first step of Holm's method tests at 5 % divided by it.

    Returns:
        The number of seeds; None if 1,000 do not suffice.
    """
    if not deviation:
        return 2
    for seeds in range(2, MOST_SEEDS + 1):
        shift, freedom = margin * math.sqrt(seeds) / deviation, seeds - 1
        # Two one-sided tests have to reject, and they fail with equal probability.
        if 1 - 2 * stats.nct.cdf(stats.t.ppf(1 - LEVEL / comparisons, freedom), freedom, shift) >= POWER:
            return seeds
    return None
