"""Means with intervals, and the table of a corpus."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from .recipes import Recipe, reference_of, title

# Student's t at 97.5 % by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Losses = Mapping[str, Mapping[int, float]]  # row → seed → nats per byte
Steps = Mapping[str, Mapping[int, int | None]]  # row → seed → step, None where there is none


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; infinite for one value."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), half


def differences(losses: Losses, row: str) -> list[float]:
    """Loss of a row less that of the ReMoE beside it, by the seeds that both have."""
    reference = losses.get(reference_of(row), {})
    return [losses[row][seed] - reference[seed] for seed in sorted(losses[row].keys() & reference.keys())]


def markdown(losses: Losses, tuned: Mapping[str, Recipe], settled: Steps) -> str:
    """A row for each routing or run: loss, and its difference to ReMoE's by seed.

    Args:
        losses: of the rows that are there.
        tuned: row → what its tuning came to.
        settled: from when on S stays at its target; no such column where nothing settles.
    """
    steps = {row: _median(settled.get(row, {})) for row in losses}
    heads = ["", "loss", "above ReMoE", *(["S settled"] if any(steps.values()) else []), "seeds"]
    lines = [f"| {' | '.join(heads)} |".replace("|  |", "| |"), "|---" * len(heads) + "|"]
    for row in losses:
        name = f"{title(row)}: {tuned[row]}" if row in tuned else title(row)
        above = "" if row == reference_of(row) else _told(differences(losses, row), "+")
        cells = [name, _told(list(losses[row].values())), above, *([steps[row]] if any(steps.values()) else [])]
        lines.append(f"| {' | '.join(cells)} | {len(losses[row])} |")
    return "\n".join(lines)


def verdicts(losses: Losses) -> Iterator[str]:
    """Of each row in words: whether the ReMoE beside it is below it, above it, or neither can be told."""
    for row in losses:
        values = differences(losses, row) if row != reference_of(row) else []
        if values:
            mean, half = interval(values)
            told = "cannot be told" if abs(mean) <= half else "ReMoE is lower" if mean > 0 else "ReMoE is higher"
            yield f"{title(row)}: {told}"


def _median(steps: Mapping[int, int | None]) -> str:
    """Over the seeds; with how many of them where not all have settled."""
    found = [step for step in steps.values() if step is not None]
    if not found:
        return ""
    told = f"{statistics.median_low(found)}"
    return told if len(found) == len(steps) else f"{told} ({len(found)} of {len(steps)})"


def _told(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}.3f}" + (f" ± {half:.3f}" if math.isfinite(half) else "")
