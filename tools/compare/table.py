"""Means with intervals, and the table of a corpus."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..common.markdown import table
from .recipes import Recipe, is_routing, reference_of, title

# Student's t at 97.5 % by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Result:
    """Of one training.

    loss: nats per byte.
    settled: the step from which S stays at its target; None where it does not, or there is no S.
    flip_rate, flip_count: of the routing decisions late in the training, where they were measured.
    routing: what tools/analyze found, where it was asked: name → of each MoE layer.
    """

    loss: float
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    routing: dict[str, list[float | None]] = field(default_factory=dict)


Results = Mapping[str, Mapping[int, Result]]  # row → seed → what came out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; infinite for one value."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), half


def differences(results: Results, row: str) -> list[float]:
    """Loss of a row less that of the ReMoE beside it, by the seeds that both have."""
    of, beside = results[row], results.get(reference_of(row), {})
    return [of[seed].loss - beside[seed].loss for seed in sorted(of.keys() & beside.keys())]


def markdown(results: Results, tuned: Mapping[str, Recipe]) -> str:
    """A row for each routing or run: loss, and its difference to ReMoE's by seed.

    With runs that are no routings it is told too from when on S stays at its target, and how many decisions flip.

    Args:
        results: of the rows that are there.
        tuned: row → what its tuning came to.
    """
    columns = {
        "": {row: f"{title(row)}: {tuned[row]}" if row in tuned else title(row) for row in results},
        "loss": {row: shown([each.loss for each in of.values()]) for row, of in results.items()},
        "above ReMoE": {row: shown(differences(results, row), "+") for row in results if row != reference_of(row)},
    }
    if any(not is_routing(row) for row in results):
        more = {
            "S settled": {row: _settled([each.settled for each in of.values()]) for row, of in results.items()},
            "flip rate": {row: _flips([each.flip_rate for each in of.values()]) for row, of in results.items()},
            "flips per token": {row: _flips([each.flip_count for each in of.values()]) for row, of in results.items()},
        }
        columns |= {name: told for name, told in more.items() if any(told.values())}
    columns["seeds"] = {row: str(len(of)) for row, of in results.items()}
    return "\n".join(table([*columns], ([told.get(row, "") for told in columns.values()] for row in results)))


def verdicts(results: Results) -> Iterator[str]:
    """Of each row in words: whether the ReMoE beside it is below it, above it, or neither can be told."""
    for row in results:
        values = differences(results, row) if row != reference_of(row) else []
        if values:
            mean, half = interval(values)
            told = "cannot be told" if abs(mean) <= half else "ReMoE is lower" if mean > 0 else "ReMoE is higher"
            yield f"{title(row)}: {told}"


def _settled(steps: Sequence[int | None]) -> str:
    """Median over the seeds, with how many of them where not all have settled."""
    found = [step for step in steps if step is not None]
    if not found:
        return ""
    median = f"{statistics.median_low(found)}"
    return median if len(found) == len(steps) else f"{median} ({len(found)} of {len(steps)})"


def _flips(values: Sequence[float | None]) -> str:
    return shown([value for value in values if value is not None], digits=4)


def shown(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Mean and interval; nothing of no values."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}z.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
