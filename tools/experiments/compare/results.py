"""Keep the points of all trainings in one file, and compare arms with a reference: gaps, and their table."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

from megatron.remoe.files.files import write_text

from ...console.errors import ToolError
from ...console.files import write_json
from ...console.markdown import table
from ..sweep.plan import BASE_SIZE
from . import significance
from .plan import ARMS, REFERENCE, Training
from .trunks import Point

Points = Mapping[str, Mapping[int, Sequence[Point]]]  # arm → seed → points
Key = tuple[str, int, bool]  # arm, steps of the reference, and whether at its FLOPs instead of its steps
HEADER = (
    "steps", "arm", "loss", "FLOPs", "S first near", "inactive experts",
    "gap, equal steps (seeds)", "verdict", "gap, equal FLOPs (seeds)", "verdict",
)  # fmt: skip


class Results:
    """The points of all trainings, in one file.

    Raises:
        ToolError: the file is not one of results.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._found: dict[str, dict[str, Any]] = {}
        try:
            self._found = json.loads(path.read_text(encoding="utf-8"))
            for entry in self._found.values():
                entry["points"] = [Point(**point) for point in entry["points"]]
        except FileNotFoundError:
            pass
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ToolError(f"{path}: no results of a comparison: {type(error).__name__}: {error}.") from error

    def of(self, training: Training) -> list[Point]:
        """Return the points of a training."""
        return [*self._found.get(training.name, {}).get("points", [])]

    def by_arm(self, like: Training, seeds: Sequence[int], rates: Mapping[tuple[int, str], float]) -> Points:
        """Return the points of all arms and these seeds that are otherwise like a training, at these learning rates."""
        found = {
            arm: {seed: self.of(replace(like, arm=arm, seed=seed).tuned(rates)) for seed in sorted(seeds)}
            for arm in ARMS
        }
        return {arm: {seed: points for seed, points in of.items() if points} for arm, of in found.items()}

    def add(self, training: Training, point: Point) -> None:
        """Add a point, and write the file."""
        with self._lock:
            entry = self._found.setdefault(training.name, asdict(training) | {"points": []})
            entry["points"].append(point)
            plain = {name: of | {"points": [*map(asdict, of["points"])]} for name, of in self._found.items()}
            write_json(self._path, plain)

    def write_points(self, path: Path) -> None:
        """Write what the tables need to a small file, with a line for each training."""
        lines = []
        for name, entry in sorted(self._found.items()):
            points = [
                {key: value for key, value in asdict(each).items() if key != "seconds"} for each in entry["points"]
            ]
            for point in points:
                point |= {"loss": round(point["loss"], 6), "flops": float(f"{point['flops']:.8g}")}
            lines.append(f"{json.dumps(name)}: {json.dumps(entry | {'points': points})}")
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    def tunings(self, steps: int, warmup: int, size: str) -> dict[tuple[int, str], dict[float, float]]:
        """Return experts and routing → factor on the learning rate → loss after these steps, in nats per token."""
        found: dict[tuple[int, str], dict[float, float]] = {}
        for entry in self._found.values():
            losses = [point.loss for point in entry["points"] if point.steps == steps]
            if entry["is_tuning"] and losses and (entry["warmup"], entry.get("size", BASE_SIZE)) == (warmup, size):
                key = entry["experts"], ARMS[entry["arm"]].routing
                found.setdefault(key, {})[entry["factor"]] = losses[0]
        return found

    def rates(self, steps: int, warmup: int, size: str) -> dict[tuple[int, str], float]:
        """Return experts and routing → the factor with the lowest loss after these steps."""
        return {key: min(of, key=of.__getitem__) for key, of in self.tunings(steps, warmup, size).items()}


def losses_of(points: Points) -> dict[Key, dict[int, float]]:
    """Return the losses by arm, length, and whether at equal FLOPs; and by seed. ReMoE's are at both."""
    found: dict[Key, dict[int, float]] = {}
    for arm, of_seeds in points.items():
        for seed, point in ((seed, point) for seed, of in of_seeds.items() for point in of):
            for matched in (False, True) if arm == REFERENCE else (point.equal_to is not None,):
                found.setdefault((arm, point.equal_to or point.steps, matched), {})[seed] = point.loss
    return found


def differences_of(points: Points, reference: str = REFERENCE) -> dict[Key, list[float]]:
    """Return each arm's losses minus those of the arm `reference` with the same seeds."""
    losses = losses_of(points)
    found: dict[Key, list[float]] = {}
    for (arm, steps, matched), of in losses.items():
        others = losses.get((reference, steps, matched), {})
        if arm != reference and (values := [loss - others[seed] for seed, loss in of.items() if seed in others]):
            found[arm, steps, matched] = values
    return found


def flops_at(points: Points, arm: str, steps: int) -> float:
    """Return an arm's mean FLOPs after these steps; NaN if it has no such point."""
    found = [point.flops for of in points[arm].values() for point in of if _is_at(point, steps)]
    return statistics.fmean(found) if found else math.nan


def _is_at(point: Point, steps: int) -> bool:
    return point.steps == steps and point.equal_to is None


def markdown(points: Points, margin: float, reference: str = REFERENCE) -> Iterator[str]:
    """Yield the lines of the table of one number of experts: a row for each length and arm.

    Inactive experts are means by layer. The gap is an arm's loss minus that of the arm `reference` after as many steps,
    mean over the seeds that both have; their number follows. At equal FLOPs, both have those of ReMoE after these
    steps. All gaps are one family of comparisons.
    """
    losses, differences = losses_of(points), differences_of(points, reference)
    found = significance.compare(differences, margin)
    rows = []
    for steps in sorted({steps for _, steps, matched in losses if not matched}):
        for arm in points:
            if (arm, steps, False) not in losses:
                continue
            at = [point for of in points[arm].values() for point in of if _is_at(point, steps)]
            near = [point.first_near for point in at if point.first_near is not None]
            cells = [f"{steps}", arm, f"{statistics.fmean(losses[arm, steps, False].values()):.4f}"]
            cells += [f"{flops_at(points, arm, steps):.4g}", str(statistics.median_low(near)) if near else ""]
            layers = zip(*(point.inactive for point in at if point.inactive), strict=True)
            cells.append(", ".join(f"{statistics.fmean(counts):.1f}" for counts in layers))
            for matched in (False, True):
                each = found.get((arm, steps, matched))
                cells += ["", ""] if each is None else [_gap(each, differences[arm, steps, matched]), each.verdict]
            rows.append(cells)
    yield from table([*HEADER], rows)
    for steps in sorted({steps for _, steps, _ in found}):
        spreads = [
            statistics.variance(values) for key, values in differences.items() if key[1] == steps and len(values) > 1
        ]
        if spreads:
            deviation = math.sqrt(statistics.fmean(spreads))
            seeds = significance.seeds_for_equivalence(margin, deviation, len(found))
            yield ""
            yield (
                f"{steps} steps: gaps differ by {deviation:.4f} between seeds (root mean square). Equal arms need "
                f"{seeds or 'more than 1000'} seeds to be found equivalent within {margin:g}."
            )
    if found:
        yield ""
        yield f"± is a 95 % paired t-interval of one gap; verdicts are corrected by Holm for {len(found)} comparisons."


def _gap(each: significance.Difference, values: Sequence[float]) -> str:
    half = f" ± {each.half:.4f}" if math.isfinite(each.half) else ""
    return f"{each.mean:+.4f}{half} ({len(values)})"
