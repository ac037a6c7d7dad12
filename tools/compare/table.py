"""Compute means with intervals, and make the table of a corpus."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        settled: the first step from which S stays at its target; None if it does not, or for other routings.
        flip_rate, flip_count: flips in the second half of the training, if measured.
        routing: figures of tools/analyze, if it ran: name → a value for each MoE layer.
    """

    loss: float
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    routing: dict[str, list[float | None]] = field(default_factory=dict)


Results = Mapping[str, Mapping[int, Result]]  # row → seed → result


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval by Student's t, which is infinite for one value."""
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), half


def differences(results: Results, row: str) -> list[float]:
    """Return the loss of a row minus that of its ReMoE, for each seed that both have."""
    of, reference = results[row], results.get(reference_of(row), {})
    return [of[seed].loss - reference[seed].loss for seed in sorted(of.keys() & reference.keys())]


def markdown(results: Results, tuned: Mapping[str, Recipe]) -> str:
    """Return a table with a row for each routing or run: loss, and its difference to ReMoE's by seed.

    If there are runs of a figure, it has also the step from which S stays at its target, and flips.

    Args:
        results: row → seed → result.
        tuned: row → the chosen settings.
    """
    columns = {
        "": {row: f"{title(row)}: {tuned[row]}" if row in tuned else title(row) for row in results},
        "loss": {row: format_mean([each.loss for each in of.values()]) for row, of in results.items()},
        "above ReMoE": {
            row: format_mean(differences(results, row), "+") for row in results if row != reference_of(row)
        },
    }
    if any(not is_routing(row) for row in results):
        more = {
            "S settled": {row: _format_settled([each.settled for each in of.values()]) for row, of in results.items()},
            "flip rate": {row: _format_flips(each.flip_rate for each in of.values()) for row, of in results.items()},
            "flips per token": {
                row: _format_flips(each.flip_count for each in of.values()) for row, of in results.items()
            },
        }
        columns |= {name: cells for name, cells in more.items() if any(cells.values())}
    columns["seeds"] = {row: str(len(of)) for row, of in results.items()}
    return "\n".join(table([*columns], ([cells.get(row, "") for cells in columns.values()] for row in results)))


def verdicts(results: Results) -> Iterator[str]:
    """Yield for each row whether the loss of its ReMoE is significantly lower or higher."""
    for row in results:
        values = differences(results, row) if row != reference_of(row) else []
        if values:
            mean, half = interval(values)
            verdict = "ReMoE is lower" if mean > 0 else "ReMoE is higher"
            yield f"{title(row)}: {verdict if abs(mean) > half else 'no significant difference'}"


def _format_settled(steps: Sequence[int | None]) -> str:
    """Return the median over the seeds as text, and the number that settled if not all did."""
    found = [step for step in steps if step is not None]
    if not found:
        return ""
    median = f"{statistics.median_low(found)}"
    return median if len(found) == len(steps) else f"{median} ({len(found)} of {len(steps)})"


def _format_flips(values: Iterable[float | None]) -> str:
    return format_mean([value for value in values if value is not None], digits=4)


def format_mean(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Return the mean and its interval as text; "" without values."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}z.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
