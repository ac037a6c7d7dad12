"""Compute means with intervals, and make the table and the verdicts of a corpus."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

from ..common.markdown import table
from . import significance
from .recipes import Recipe, is_routing, reference_of, title


@dataclass(frozen=True)
class Result:
    """Result of one training.

    Attributes:
        loss: nats per byte.
        settled: the first step from which S stays at its target; None if it does not, or for other routings.
        flip_rate, flip_count: flips in the second half of the training, if measured.
        routing: figures of tools/analyze, if it ran: name → a value for each MoE layer.
        steps: optimizer steps; None in results of older versions.
        flops: of the whole training, with the experts that were computed; None if unknown.
        first_near: the first logged step with S within 1 % of its target.
        changed_tokens: share of tokens that get other experts by an update, as the flips.
    """

    loss: float
    settled: int | None = None
    flip_rate: float | None = None
    flip_count: float | None = None
    routing: dict[str, list[float | None]] = field(default_factory=dict)
    steps: int | None = None
    flops: float | None = None
    first_near: int | None = None
    changed_tokens: float | None = None


Results = Mapping[str, Mapping[int, Result]]  # row → seed → result


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval by Student's t, which is infinite for one value."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
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
            "S first near": {
                row: _format_steps([each.first_near for each in of.values()]) for row, of in results.items()
            },
            "S settled": {row: _format_steps([each.settled for each in of.values()]) for row, of in results.items()},
            "flip rate": {row: _format_flips(each.flip_rate for each in of.values()) for row, of in results.items()},
            "flips per token": {
                row: _format_flips(each.flip_count for each in of.values()) for row, of in results.items()
            },
            "tokens changed": {
                row: _format_flips(each.changed_tokens for each in of.values()) for row, of in results.items()
            },
        }
        columns |= {name: cells for name, cells in more.items() if any(cells.values())}
    costs = {
        "steps": {row: _format_range([each.steps for each in of.values()]) for row, of in results.items()},
        "FLOPs": {row: _format_flops([each.flops for each in of.values()]) for row, of in results.items()},
    }
    columns |= {name: cells for name, cells in costs.items() if any(cells.values())}
    columns["seeds"] = {row: str(len(of)) for row, of in results.items()}
    return "\n".join(table([*columns], ([cells.get(row, "") for cells in columns.values()] for row in results)))


def verdicts(results: Results, margin: float) -> Iterator[str]:
    """Yield how much seeds differ, then for each row its mean loss against that of its ReMoE, with a verdict.

    Args:
        results: row → seed → result.
        margin: the largest difference of the losses that counts as none.
    """
    losses = {row: [each.loss for each in of.values()] for row, of in results.items()}
    pairs = [(row, reference_of(row)) for row in results if row != reference_of(row) and reference_of(row) in results]
    spread = significance.spread_of(losses.values())
    if not (pairs and spread.deviation > 0):
        return
    pooling = "pooled" if spread.is_equal else "not pooled, since rows differ in it"
    equal = "" if math.isnan(spread.p) else f"; equal spread: p = {spread.p:.2g}"
    yield f"seeds differ by {spread.deviation:.3f} ({spread.freedom} degrees of freedom{equal}; {pooling})"
    for each in significance.differences(losses, pairs, margin):
        interval_text = f"{each.mean:+.3f} ± {each.half:.3f}" if math.isfinite(each.half) else f"{each.mean:+.3f}"
        yield (
            f"{title(each.row)} against ReMoE: {interval_text}, p = {each.p_different:.2g}, "
            f"equivalence p = {each.p_equivalent:.2g}: {each.verdict}"
        )
    see, equal_to = significance.seeds_to_see, significance.seeds_for_equivalence
    needed = (_format_seeds(seeds, margin, spread.deviation, len(pairs)) for seeds in (see, equal_to))
    yield "seeds per row to see a difference of {0:g}: {1}; to show equivalence within {0:g}: {2}".format(
        margin, *needed
    )


def _format_steps(steps: Sequence[int | None]) -> str:
    """Return the median over the seeds as text, and the number that settled if not all did."""
    found = [step for step in steps if step is not None]
    if not found:
        return ""
    median = f"{statistics.median_low(found)}"
    return median if len(found) == len(steps) else f"{median} ({len(found)} of {len(steps)})"


def _format_seeds(seeds: Callable[[float, float, int], int], margin: float, deviation: float, comparisons: int) -> str:
    try:
        return str(seeds(margin, deviation, comparisons))
    except ValueError:
        return f"more than {significance.MOST_SEEDS}"


def _format_range(values: Iterable[int | None]) -> str:
    """Return the smallest and the largest of the seeds' values."""
    found = sorted(value for value in values if value is not None)
    return "" if not found else f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _format_flops(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.fmean(found):.4g}" if found else ""


def _format_flips(values: Iterable[float | None]) -> str:
    return format_mean([value for value in values if value is not None], digits=4)


def format_mean(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Return the mean and its interval as text; "" without values."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:{sign}z.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")
