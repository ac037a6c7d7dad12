"""Decide what a table of losses shows: pooled spread, corrected p-values, equivalence, and the seeds that it takes.

Two arms with the same seed see the same text in the same order, so they are compared seed by seed. The differences of
all arms at one length together estimate their spread, if it is equal, which the Brown-Forsythe test checks; otherwise
each comparison uses its own. Holm's correction holds the probability of any false claim in the table at 5 %.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
POWER = 0.8
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Spread:
    """How much the differences of two arms vary by seed.

    Attributes:
        deviation: standard deviation pooled over the rows; NaN if no row has two values.
        freedom: its degrees of freedom.
        p: of the Brown-Forsythe test that all rows have the same spread; NaN if fewer than two rows have two values.
    """

    deviation: float
    freedom: int
    p: float

    @property
    def is_equal(self) -> bool:
        """Return whether nothing speaks against pooling."""
        return not self.p < LEVEL


@dataclass(frozen=True)
class Difference:
    """The mean difference of two arms, with p-values corrected by Holm for all comparisons of the table.

    Attributes:
        mean: the arm's minus its reference's, in the unit of the losses.
        half: half of the 95 % interval, of this comparison alone; infinite if there are too few seeds.
        p_different: of two equal arms.
        p_equivalent: of two arms whose difference is at least `margin` (TOST).
        margin: the largest difference that counts as none.
    """

    mean: float
    half: float
    p_different: float
    p_equivalent: float
    margin: float

    @property
    def verdict(self) -> str:
        """Return lower, higher, equivalent or inconclusive; a difference below the margin is equivalent too."""
        if self.p_equivalent < LEVEL:
            return f"equivalent within {self.margin:g}"
        if self.p_different < LEVEL:
            return "higher" if self.mean > 0 else "lower"
        return "inconclusive"


def spread_of(values: Iterable[Sequence[float]]) -> Spread:
    """Pool the spread of rows; rows with one value have none."""
    rows = [np.asarray(row, float) for row in values if len(row) > 1]
    freedom = sum(len(row) - 1 for row in rows)
    if not freedom:
        return Spread(math.nan, 0, math.nan)
    variance = sum((len(row) - 1) * row.var(ddof=1) for row in rows) / freedom
    # Rows of two values have equal distances to their median, so the test needs a row of three.
    testable = len(rows) > 1 and max(map(len, rows)) > 2 and variance > 0
    p = float(stats.levene(*rows, center="median").pvalue) if testable else math.nan
    return Spread(math.sqrt(variance), freedom, p)


def compare[Row: Hashable](groups: Iterable[Mapping[Row, Sequence[float]]], margin: float) -> dict[Row, Difference]:
    """Compare arms with their references.

    Args:
        groups: rows that share a spread: row → the difference to its reference for each seed.
        margin: the largest mean difference that counts as none.

    Returns:
        A difference for each row.
    """
    found: dict[Row, tuple[float, float, float]] = {}
    for rows in groups:
        spread = spread_of(rows.values())
        for row, values in rows.items():
            own = spread if spread.is_equal else spread_of([values])
            found[row] = float(np.mean(values)), own.deviation / math.sqrt(len(values)), float(own.freedom)
    different = holm([_p_different(*each) for each in found.values()])
    equivalent = holm([_p_equivalent(*each, margin) for each in found.values()])
    return {
        row: Difference(mean, _half(error, freedom), p, q, margin)
        for (row, (mean, error, freedom)), p, q in zip(found.items(), different, equivalent, strict=True)
    }


def _half(error: float, freedom: float) -> float:
    return float(stats.t.ppf(1 - LEVEL / 2, freedom) * error) if freedom else math.inf


def _p_different(mean: float, error: float, freedom: float) -> float:
    if not error:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, freedom)) if freedom else 1.0


def _p_equivalent(mean: float, error: float, freedom: float, margin: float) -> float:
    """Two one-sided tests: the larger p-value of "at most -margin" and "at least margin"."""
    if not error:
        return float(abs(mean) >= margin)
    return float(stats.t.sf((margin - abs(mean)) / error, freedom)) if freedom else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected by Holm's step-down method for that many tests."""
    order = np.argsort(values)
    steps = np.asarray(values, float)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def seeds_for_equivalence(margin: float, deviation: float, comparisons: int = 1) -> int | None:
    """Return the seeds with which two equal arms are found equivalent with a probability of 80 %.

    Args:
        margin: of the test, in the unit of the losses.
        deviation: of the difference of two equal arms, as in `Spread`.
        comparisons: of the table; the first step of Holm's method tests at 5 % divided by their number.

    Returns:
        Their number; None if 1,000 do not suffice.
    """
    for seeds in range(2, MOST_SEEDS + 1):
        shift, freedom = margin * math.sqrt(seeds) / deviation if deviation else math.inf, seeds - 1
        # Both one-sided tests have to reject; neither is likelier to fail than the other.
        if 1 - 2 * stats.nct.cdf(stats.t.ppf(1 - LEVEL / comparisons, freedom), freedom, shift) >= POWER:
            return seeds
    return None
