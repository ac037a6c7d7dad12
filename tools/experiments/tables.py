"""Tabulate losses over seeds, with their differences from a reference: intervals, and verdicts corrected by Holm."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..console.markdown import table
from .significance import MARGIN, Difference, compare, half_width, seeds_for_equivalence

Values = Mapping[str, Any]  # names of `Result`'s attributes → values; absent or None if unknown
EQUAL_STEPS, EQUAL_FLOPS = "gap", "gap, equal FLOPs"
COLUMNS = (
    "loss", EQUAL_STEPS, "verdict", EQUAL_FLOPS, "verdict, equal FLOPs", "steps, equal FLOPs", "FLOPs",
    "experts per token", "inactive experts", "S first near", "S settled", "flip rate", "flips per token", "seconds",
    "seeds",
)  # fmt: skip


@dataclass
class Line:
    """A row of a table: runs that differ in their seeds only.

    Attributes:
        titles: one for each of the table's first columns.
        seeds: seed → values of the run.
        matched: seed → values of the run with equal FLOPs; equals `seeds` for the arm that sets them.
        reference: titles of the line from which gaps are measured; empty for none.
    """

    titles: tuple[str, ...]
    seeds: dict[int, Values]
    matched: dict[int, Values] = field(default_factory=dict)
    reference: tuple[str, ...] = ()


def interval(values: Sequence[float], sign: str = "", digits: int = 4) -> str:
    """Return the mean and half of its 95 % interval; "" without values."""
    if not values:
        return ""
    half = f" ± {half_width(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}z.{digits}f}{half}"


def gaps(lines: Sequence[Line]) -> dict[tuple[tuple[str, ...], str], list[float]]:
    """Return titles and kind of gap → loss minus the reference's loss, for each seed that both have."""
    by_titles = {line.titles: line for line in lines}
    values_of_lines = {}
    for line in lines:
        reference = by_titles.get(line.reference)
        if reference is None or reference is line:
            continue
        pairs = {EQUAL_STEPS: (line.seeds, reference.seeds), EQUAL_FLOPS: (line.matched, reference.matched)}
        for kind, (mine, others) in pairs.items():
            values = [mine[seed]["loss"] - others[seed]["loss"] for seed in mine if seed in others]
            if values:
                values_of_lines[line.titles, kind] = values
    return values_of_lines


def markdown(header: Sequence[str], lines: Sequence[Line]) -> Iterator[str]:
    """Yield the lines of a table, without columns that have no values, and a note on its comparisons.

    All gaps of the table are one family of comparisons. Inactive experts are means by layer. The steps at which S is
    first near and settles are medians of the seeds that reach it; their number follows if some seeds do not.
    """
    differences = gaps(lines)
    verdicts = compare(differences, MARGIN)
    rows = [[*line.titles, *_cells(line, differences, verdicts)] for line in lines]
    titles = [*header, *COLUMNS]
    kept = [column for column in range(len(titles)) if column < len(header) or any(row[column] for row in rows)]
    yield from table([titles[column] for column in kept], ([row[column] for column in kept] for row in rows))
    if not verdicts:
        return
    yield ""
    corrected = f"; verdicts are corrected by Holm for {len(verdicts)} comparisons" if len(verdicts) > 1 else ""
    yield f"± is a 95 % t-interval, of paired gaps{corrected}."
    spreads = [statistics.variance(values) for values in differences.values() if len(values) > 1]
    if spreads:
        deviation = math.sqrt(statistics.fmean(spreads))
        seeds = seeds_for_equivalence(MARGIN, deviation, len(verdicts))
        yield (
            f"Gaps differ by {deviation:.4f} between seeds (root mean square). Equal arms need "
            f"{seeds or 'more than 1000'} seeds to be found equivalent within {MARGIN:g}."
        )


def _cells(
    line: Line,
    differences: Mapping[tuple[tuple[str, ...], str], Sequence[float]],
    verdicts: Mapping[tuple[tuple[str, ...], str], Difference],
) -> list[str]:
    """Return the cells of a line under `COLUMNS`."""
    runs = [*line.seeds.values()]

    def known(name: str) -> list[Any]:
        return [value for each in runs if (value := each.get(name)) is not None]

    def mean(name: str, form: str) -> str:
        return format(statistics.fmean(known(name)), form) if known(name) else ""

    cells = [interval([each["loss"] for each in runs])]
    for kind in (EQUAL_STEPS, EQUAL_FLOPS):
        values = differences.get((line.titles, kind), ())
        verdict = verdicts[line.titles, kind].verdict if values else ""
        cells += [f"{interval(values, '+')} ({len(values)})" if values else "", verdict]
    steps = sorted({each["iterations"] for each in line.matched.values() if "iterations" in each})
    cells.append(f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else "".join(map(str, steps)))
    layers = zip(*filter(None, known("inactive")), strict=True)
    cells += [mean("flops", ".4g"), mean("experts_per_token", ".2f")]
    cells.append(", ".join(f"{statistics.fmean(counts):.1f}" for counts in layers))
    for name in ("first_near", "settled"):
        reached = sorted(known(name))
        part = f" ({len(reached)} of {len(runs)})" if len(reached) < len(runs) else ""
        cells.append(f"{statistics.median_low(reached)}{part}" if reached else "")
    cells += [interval(known("flip_rate")), interval(known("flip_count")), mean("training_seconds", ".0f")]
    return [*cells, str(len(runs))]
