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
    """Result of one training.

    Attributes:
        loss: nats per byte.
        settled: the step from which S stays at its target; None if it does not, or if there is no S.
        flip_rate, flip_count: flips late in the training, if they were measured.
        routing: figures of tools/analyze, if it ran: name → a value for each MoE layer.
    """

    loss: float
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    routing: dict[str, list[float | None]] = field(default_factory=dict)


Results = Mapping[str, Mapping[int, Result]]  # row → seed → what came out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and half of its 95 % interval by Student's t; infinite for one value."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), half


def differences(results: Results, row: str) -> list[float]:
    """Return the loss of a row minus that of its ReMoE, for the seeds that both have."""
    of, beside = results[row], results.get(reference_of(row), {})
    return [of[seed].loss - beside[seed].loss for seed in sorted(of.keys() & beside.keys())]


def markdown(results: Results, tuned: Mapping[str, Recipe]) -> str:
    """Return a row for each routing or run: loss, and its difference to ReMoE's by seed.

    With runs of a figure there are also the step from which S stays at its target, and flips.

    Args:
        results: row → seed → result.
        tuned: row → the settings that were chosen.
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
    """Yield for each row whether its ReMoE is lower, higher, or neither with confidence."""
    for row in results:
        values = differences(results, row) if row != reference_of(row) else []
        if values:
            mean, half = interval(values)
            told = "cannot be told" if abs(mean) <= half else "ReMoE is lower" if mean > 0 else "ReMoE is higher"
            yield f"{title(row)}: {told}"


def _settled(steps: Sequence[int | None]) -> str:
    """Return the median over the seeds, and how many of them settled if not all did."""
    found = [step for step in steps if step is not None]
    if not found:
        return ""
    median = f"{statistics.median_low(found)}"
    return median if len(found) == len(steps) else f"{median} ({len(found)} of {len(steps)})"


def _flips(values: Sequence[float | None]) -> str:
    return shown([value for value in values if value is not None], digits=4)


def shown(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Return mean and interval as text; "" without values."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}z.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
