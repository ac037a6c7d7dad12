"""Make the tables of the experiment: the gap to ReMoE at each length, at equal steps and at equal FLOPs."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from ..common.markdown import table
from ..compare import significance
from .plan import REFERENCE
from .trunks import Point

Points = Mapping[str, Mapping[int, Sequence[Point]]]  # arm → seed → points
HEADER = ("steps", "arm", "loss", "FLOPs", "S first near", "gap, equal steps", "verdict", "gap, equal FLOPs", "verdict")


def markdown(points: Points, margin: float) -> Iterator[str]:
    """Yield the lines of the table of one number of experts: a row for each length and arm.

    The gap is an arm's mean loss minus that of ReMoE after as many steps; at equal FLOPs, the arm has trained longer or
    shorter. All gaps of the table are one family of comparisons.

    Args:
        points: arm → seed → points.
        margin: the largest difference that counts as none.
    """
    losses = _losses(points)
    lengths = sorted({steps for _, steps, matched in losses if not matched})
    keys = {key: f"{arm}{'=' if matched else '@'}{steps}" for key in losses for arm, steps, matched in [key]}
    named = {keys[key]: [*of.values()] for key, of in losses.items()}
    pairs = [
        (keys[key], keys[REFERENCE, key[1], False])
        for key in losses
        if key[0] != REFERENCE and (REFERENCE, key[1], False) in losses
    ]
    found = {each.row: each for each in significance.differences(named, pairs, margin)}
    rows = []
    for steps in lengths:
        for arm in points:
            at = [
                point for of in points[arm].values() for point in of if (point.steps, point.equal_to) == (steps, None)
            ]
            if not at:
                continue
            near = [point.first_near for point in at if point.first_near is not None]
            cells = [f"{steps}", arm, f"{statistics.fmean(point.loss for point in at):.4f}"]
            cells += [
                f"{statistics.fmean(point.flops for point in at):.4g}",
                str(statistics.median_low(near)) if near else "",
            ]
            for sign in "@=":
                each = found.get(f"{arm}{sign}{steps}")
                cells += ["", ""] if each is None else [_gap(each), each.verdict]
            rows.append(cells)
    yield from table([*HEADER], rows)
    spread = significance.spread_of(named.values())
    if spread.freedom:
        pooled = "pooled" if spread.is_equal else "not pooled"
        yield ""
        yield (
            f"Seeds differ by {spread.deviation:.4f} ({spread.freedom} degrees of freedom; equal spread: "
            f"p = {spread.p:.2g}; {pooled}); margin {margin:g}; {len(pairs)} comparisons, corrected by Holm."
        )


def _losses(points: Points) -> dict[tuple[str, int, bool], dict[int, float]]:
    """Return (arm, steps of the reference, whether at equal FLOPs) → seed → loss."""
    found: dict[tuple[str, int, bool], dict[int, float]] = {}
    for arm, of_seeds in points.items():
        for seed, of in of_seeds.items():
            for point in of:
                key = arm, point.equal_to or point.steps, point.equal_to is not None
                found.setdefault(key, {})[seed] = point.loss
    return found


def _gap(each: significance.Difference) -> str:
    return f"{each.mean:+.4f}" + (f" ± {each.half:.4f}" if math.isfinite(each.half) else "")
