"""Hold the figures of a run: curves, and facts derived from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.remoe.training.run_log import TOTALS, as_whole_number

WITHIN = 0.01  # share of the target within which S counts as settled
SMOOTHED = 0.03  # each point drawn is the mean over this share of the curve
INACTIVE = 1 / 8  # an expert below this share of the even load is inactive; paper, figure 8b: 1/64 with 8 experts


class Curve(NamedTuple):
    """A figure by iteration: increasing iterations, int64 [points], and finite values, float64 [points]."""

    iterations: NDArray[np.int64]
    values: NDArray[np.float64]


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


def smooth(curve: Curve) -> Curve:
    """Return the centered moving mean over a share `SMOOTHED` of the points, and over fewer points at both ends."""
    count = len(curve.values)
    half = max(1, round(count * SMOOTHED / 2))
    sums, places = np.concatenate([[0.0], np.cumsum(curve.values)]), np.arange(count)
    first, end = (places - half).clip(min=0), (places + half + 1).clip(max=count)
    means = (sums[end] - sums[first]) / (end - first)
    return Curve(curve.iterations, np.where(np.isfinite(means), means, curve.values))


class Evaluation(NamedTuple):
    """A validation loss in nats per token; `final`: measured after the last step; `tokens`: predicted, 0 if unknown."""

    iteration: int
    loss: float
    final: bool
    tokens: int = 0


def weigh(evaluations: Sequence[Evaluation]) -> list[int]:
    """Return the weight of each set's loss in a mean: its tokens, or 1 if those of any set are unknown."""
    tokens = [evaluation.tokens for evaluation in evaluations]
    return tokens if all(tokens) else [1] * len(tokens)


@dataclass
class RunFigures:
    """The logged figures of a run.

    Attributes:
        args: name of an argument of Megatron → its value at the last start.
        curves: name of a figure in metrics.jsonl → its values, for every logged number.
        layers: name of a figure by layer → layer → its values.
        loads: iteration → layer → share of its tokens for each expert, float32 [experts]: tokens with a positive gate
            with ReLU routing, else those that the expert got.
        evaluations: validation set ("" for the only one, "test") → evaluations in the order of the file.
        last: the last logged iteration; 0 before the first.
        parameters: number of the whole model's parameters; None if unknown.
        starts: iterations at which sessions started.
        name: the run's name in a comparison.
        per_byte: validation set → tokens per byte of its text; empty if unknown.
        notes: messages about data that could not be read or counted.
    """

    args: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    layers: dict[str, dict[int, Curve]] = field(default_factory=dict)
    loads: dict[int, dict[int, NDArray[np.float32]]] = field(default_factory=dict)
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    last: int = 0
    parameters: int | None = None
    starts: list[int] = field(default_factory=list)
    name: str = ""
    per_byte: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def curve(self, name: str) -> Curve:
        """Return the values of a figure; an empty curve if it was not logged."""
        return self.curves.get(name, EMPTY)

    def newest(self, name: str) -> float | None:
        """Return the last value of a figure; None if it was not logged."""
        values = self.curve(name).values
        return float(values[-1]) if len(values) else None

    def whole(self, name: str) -> int:
        """Return an argument if it is a positive whole number, else 0."""
        return as_whole_number(self.args.get(name)) or 0

    @property
    def num_experts(self) -> int:
        """Return the number of experts of a layer, with granularity; 0 for dense models, and if unknown."""
        counted = (len(load) for layers in self.loads.values() for load in layers.values())
        return self.whole("num_experts") or next(counted, 0)

    @property
    def topk(self) -> int:
        """Return k, with granularity; 0 for dense models, and if unknown."""
        return self.whole("moe_router_topk") if self.num_experts else 0

    @property
    def routing(self) -> str:
        """Return dense, topk, remoe, or the name of a baseline's router."""
        if self.args.get("moe_relu_routing"):
            return "remoe"
        return str(self.args.get("moe_baseline_router") or "topk") if self.num_experts else "dense"

    @property
    def target_sparsity(self) -> float | None:
        """Return the target of S; None without ReLU routing."""
        return self.newest("target_sparsity")

    @property
    def settled(self) -> int | None:
        """Return the first logged iteration from which S stays within 1 % of its target; None if it does not."""
        iterations, near = self._near_target()
        away = np.flatnonzero(~near)
        first = int(away[-1]) + 1 if len(away) else 0
        return int(iterations[first]) if first < len(iterations) else None

    @property
    def first_near(self) -> int | None:
        """Return the first logged iteration with S within 1 % of its target; None if there is none."""
        iterations, near = self._near_target()
        return int(iterations[near.argmax()]) if near.any() else None

    def _near_target(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        (iterations, values), target = self.curve("sparsity"), self.target_sparsity
        if target is None:
            return EMPTY.iterations, np.empty(0, bool)
        return iterations, np.abs(values - target) <= WITHIN * target

    @property
    def inactive_experts(self) -> list[int]:
        """Return each layer's number of inactive experts in the last line; [] for dense models."""
        layers = self.loads.get(self.last, {}).values()
        return [int((shares < INACTIVE * self.topk / len(shares)).sum()) for shares in layers]

    @property
    def validation_loss(self) -> float | None:
        """Return the newest validation loss, in nats per token of all sets; None before the first evaluation."""
        newest = [losses[-1] for name, losses in self.evaluations.items() if name != "test"]
        weights = weigh(newest)
        losses = (evaluation.loss * weight for evaluation, weight in zip(newest, weights, strict=True))
        return sum(losses) / sum(weights) if newest else None

    @property
    def validation_loss_per_byte(self) -> float | None:
        """Return the newest validation loss, in nats per byte of text of all sets; None if the bytes are unknown."""
        names = [name for name in self.evaluations if name != "test"]
        if (loss := self.validation_loss) is None or not {*names} <= self.per_byte.keys():
            return None
        tokens = weigh([self.evaluations[name][-1] for name in names])
        sizes = (number / self.per_byte[name] for name, number in zip(names, tokens, strict=True))
        return loss * sum(tokens) / sum(sizes)

    def final_losses(self, iteration: int) -> dict[str, float]:
        """Return validation set → its newest loss after a run of `iteration` steps, for sets that have one."""
        return {
            name: evaluation.loss
            for name, evaluations in self.evaluations.items()
            for evaluation in evaluations
            if evaluation.final and evaluation.iteration == iteration
        }

    def values(self, name: str, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the values of a figure at iterations; NaN where it was not logged."""
        logged = self.curve(name)
        if not len(logged.values):
            return np.full(len(iterations), math.nan)
        place = np.searchsorted(logged.iterations, iterations).clip(max=len(logged.values) - 1)
        return np.where(logged.iterations[place] == iterations, logged.values[place], math.nan)

    def batches(self, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the sequences of a step, averaged over the steps since the previous line; NaN if unknown."""
        logged, consumed = self.values("global_batch_size", iterations), self.values("consumed_samples", iterations)
        before = np.append(math.nan if self.began else 0.0, consumed[:-1])
        mean = (consumed - before) / np.diff(iterations, prepend=self.began)
        logged = np.where(np.isnan(logged), self.whole("global_batch_size") or math.nan, logged)
        return np.where(np.isnan(mean), logged, mean)

    @property
    def tokens_per_second(self) -> float | None:
        """Return tokens per second of all processes: the median of the log's lines without the first (the warm-up)."""
        rates = self.curve("tokens_per_second").values
        return float(np.median(rates[1:] if len(rates) > 1 else rates)) if len(rates) else None

    @property
    def began(self) -> int:
        """Return the iteration before the log's first; above 0 if earlier steps are in a different folder's log."""
        first = min(self.starts, default=0)
        return first if first < min((int(curve.iterations[0]) for curve in self.curves.values()), default=0) else 0

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Return the seconds since the previous line, for each line of the curve "seconds_per_iteration".

        Steps that have no line because of a restart count with the median time.
        """
        iterations, means = self.curve("seconds_per_iteration")
        if not len(means):
            return means
        before, starts = np.append(self.began, iterations[:-1]), np.unique([self.began, *self.starts])
        began = starts[np.searchsorted(starts, iterations).clip(min=1) - 1]
        seconds = (iterations - np.maximum(before, began)) * means
        # Megatron logs the first step after a start, and includes it in the next line's mean.
        second = np.flatnonzero(before == began + 1)
        changed = seconds[second] + means[second] - means[second - 1]
        seconds[second] = np.where(changed > 0, changed, seconds[second])
        return seconds + (began - before).clip(min=0) * np.median(means)

    def experts_per_token(self, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the computed experts per token, averaged over layers and the steps since the previous line.

        Without running sums (for example after --load from a different folder), use S of the logged step, and at most
        --moe-relu-max-experts; k without ReLU routing.
        """
        pairs, tokens = (np.diff(self.values(name, iterations), prepend=0) for name in TOTALS)
        active = self.num_experts * (1 - self.values("sparsity", iterations))
        in_step = np.minimum(active, self.whole("moe_relu_max_experts") or math.inf)
        in_step = in_step if self.target_sparsity is not None else np.full(len(active), float(self.topk))
        return np.where(tokens > 0, pairs / np.where(tokens > 0, tokens, 1), in_step)
