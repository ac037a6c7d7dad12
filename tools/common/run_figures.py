"""The figures of a run: curves, and facts that follow from them."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

WITHIN = 0.01  # of the target: S has settled
TOTALS = ("total_active_pairs", "total_layer_tokens")
LARGEST = 2**53  # of whole numbers


class Curve(NamedTuple):
    """A figure by iterations, which rise: int64 [points], float64 [points], all finite."""

    iterations: NDArray[np.int64]
    values: NDArray[np.float64]


EMPTY = Curve(np.empty(0, np.int64), np.empty(0))


class Evaluation(NamedTuple):
    """A validation loss in nats per token; `final`: measured after the training, not on its way."""

    iteration: int
    loss: float
    final: bool


@dataclass
class RunFigures:
    """What a run has logged.

    Attributes:
        args: Megatron's arguments by name, of the last start.
        curves: figure, named as in metrics.jsonl → its values; every number that was logged, known here or not.
        layers: figure that is kept by layer → layer → its values.
        loads: iteration → layer → share of the tokens that each expert got; of evenly spread lines, the last included.
        guarded: iteration → guarded layers, if there are any.
        evaluations: validation set ("" for the only one, "test") → evaluations in the order of the file.
        last: the last logged iteration; 0 before the first.
        parameters: of the whole model; None if unknown.
        written: Unix time of the newest figures.
        unread: lines that hold no record.
    """

    args: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    layers: dict[str, dict[int, Curve]] = field(default_factory=dict)
    loads: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    guarded: dict[int, list[int]] = field(default_factory=dict)
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)
    last: int = 0
    parameters: int | None = None
    written: float = 0.0
    unread: int = 0

    def curve(self, name: str) -> Curve:
        """Return the values of a figure; an empty curve if it was never logged."""
        return self.curves.get(name, EMPTY)

    def newest(self, name: str) -> float | None:
        """Return the last value of a figure."""
        values = self.curve(name).values
        return float(values[-1]) if len(values) else None

    def whole(self, name: str) -> int:
        """Return an argument that is a positive whole number; 0 if it is anything else."""
        return whole_number(self.args.get(name)) or 0

    @property
    def done(self) -> bool:
        """Whether no line of the log is still to come."""
        return self.last + (self.whole("log_interval") or 1) > (self.whole("train_iters") or math.inf)

    @property
    def num_experts(self) -> int:
        """Experts of a layer, after granularity; 0 for dense models, and if unknown."""
        counted = next((load for layers in self.loads.values() for load in layers.values()), [])
        return self.whole("num_experts") or len(counted)

    @property
    def topk(self) -> int:
        """k after granularity; 0 for dense models, and if unknown."""
        return self.whole("moe_router_topk") if self.num_experts else 0

    @property
    def routing(self) -> str:
        """dense, moe or remoe."""
        if self.args.get("moe_relu_routing") or "sparsity" in self.curves:
            return "remoe"
        return "moe" if self.num_experts else "dense"

    @property
    def target(self) -> float | None:
        """The target of S of a ReMoE: as logged, or 1 - k/E (the fork does not log it); None for other models."""
        if "sparsity" not in self.curves:
            return None
        logged = self.newest("target_sparsity")
        return 1 - self.topk / self.num_experts if logged is None and self.topk else logged

    @property
    def settled(self) -> int | None:
        """The first logged iteration from which S stays within 1 % of its target; None if it does not."""
        iterations, near = self._near_target()
        away = np.flatnonzero(~near)
        first = int(away[-1]) + 1 if len(away) else 0
        return int(iterations[first]) if first < len(iterations) else None

    @property
    def first_near(self) -> int | None:
        """The first logged iteration with S within 1 % of its target."""
        iterations, near = self._near_target()
        return int(iterations[near.argmax()]) if near.any() else None

    def _near_target(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        (iterations, values), target = self.curve("sparsity"), self.target
        if target is None:
            return EMPTY.iterations, np.empty(0, bool)
        return iterations, np.abs(values - target) <= WITHIN * target

    def at(self, name: str, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the values of a figure at iterations; NaN where it was not logged."""
        logged = self.curve(name)
        if not len(logged.values):
            return np.full(len(iterations), math.nan)
        place = np.searchsorted(logged.iterations, iterations).clip(max=len(logged.values) - 1)
        return np.where(logged.iterations[place] == iterations, logged.values[place], math.nan)

    def batches(self, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the sequences of a step at logged iterations; NaN if unknown."""
        logged = self.at("global_batch_size", iterations)
        return np.where(np.isnan(logged), self.whole("global_batch_size") or math.nan, logged)

    def experts_per_token(self, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the experts per token of a ReMoE, averaged over layers and the steps since the line before.

        S is of the logged step alone. It is used only if the running sums over all steps were not logged.
        """
        pairs, tokens = (np.diff(self.at(name, iterations), prepend=0) for name in TOTALS)
        of_the_step = self.num_experts * (1 - self.at("sparsity", iterations))
        return np.where(tokens > 0, pairs / np.where(tokens > 0, tokens, 1), of_the_step)


def whole_number(value: Any) -> int | None:
    """Return a value that is a whole number from 0 to `LARGEST`; None if it is anything else."""
    return value if type(value) is int and 0 <= value <= LARGEST else None
