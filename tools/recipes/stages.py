"""Find ReMoE's three stages in a run's log, and the time and FLOPs of each."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runs.run_figures import TOTALS, RunFigures
from .flops import flops_per_sequence

RISING = 0.1  # the dense stage ends after this share of the way from the first S to the target


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of a sequence with k experts per token, and of one more in every MoE layer."""

    sequence: float
    expert: float

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> "Flops":
        """Count the FLOPs of a model with these arguments of Megatron.

        Raises:
            ArithmeticError, AttributeError, LookupError, TypeError, ValueError: an argument that the count needs is
                missing or has another type, or the model has layers that are not counted.
        """
        named = Namespace(**args)
        sequence = flops_per_sequence(named)
        more = flops_per_sequence(named, named.moe_router_topk + 1) if getattr(named, "num_experts", None) else sequence
        return cls(sequence, more - sequence)


@dataclass(frozen=True)
class Stage:
    """Iterations `first` to `last`: their time without evaluations and saves, FLOPs, and mean experts per token."""

    name: str
    first: int
    last: int
    hours: float
    flops: float
    experts: float


def stages(figures: RunFigures, flops: Flops) -> list[Stage]:
    """Return the dense stage, the way to the target and the steady stage, as far as the log has them.

    Other models have one stage, "all". A line of the log stands for the iterations since the line before.
    """
    iterations, seconds = figures.curve("seconds_per_iteration").iterations, figures.seconds
    batches, target = figures.batches(iterations), figures.target_sparsity
    steps = np.diff(iterations, prepend=figures.began)
    if target is None and TOTALS[0] not in figures.curves:  # k experts per token, after a warm-up
        warmup, most = figures.whole("moe_warmup_steps"), figures.whole("moe_warmup_topk") or figures.topk
        warming = np.diff(iterations.clip(max=warmup), prepend=0) / np.maximum(steps, 1)
        experts = figures.topk + (most - figures.topk) * warming
    else:
        experts = figures.experts_per_token(iterations)
    known = np.isfinite(batches) & np.isfinite(experts)
    if not known.any():
        return []
    iterations, seconds, batches, experts = iterations[known], seconds[known], batches[known], experts[known]
    steps, last = steps[known], int(iterations[-1])
    ends = [("all", last)]
    if target is not None:
        sparsity = figures.at("sparsity", iterations)
        risen = sparsity - sparsity[0] > RISING * (target - sparsity[0])
        dense = int(iterations[risen.argmax() - 1]) if risen.any() else last  # the first line has not risen
        dense = 0 if sparsity[0] >= target else dense
        ends = [("dense", dense), ("way", figures.settled or last), ("steady", last)]
    cost = steps * batches * (flops.sequence + (experts - figures.topk) * flops.expert)
    stages_found, before = [], figures.began
    for name, end in ends:
        lines = (before < iterations) & (iterations <= end)
        if lines.any():
            hours, mean = seconds[lines].sum() / 3600, (steps * experts)[lines].sum() / (end - before)
            stages_found.append(Stage(name, before + 1, end, float(hours), float(cost[lines].sum()), float(mean)))
            before = end
    return stages_found


def training_flops(figures: RunFigures) -> float | None:
    """Return the FLOPs of a whole training; None if its log does not show them or does not have all steps.

    Exact where the log has the running sums of computed pairs, as each line since version 0.1 does.
    """
    try:
        flops = Flops.of(figures.args)
    except (ValueError, TypeError, AttributeError, ArithmeticError):  # uncounted layers, or a log without arguments
        return None
    stages_found = stages(figures, flops)
    if not stages_found or figures.began:
        return None
    unlogged = figures.whole("train_iters") - stages_found[-1].last  # at the target
    return sum(stage.flops for stage in stages_found) + unlogged * figures.whole("global_batch_size") * flops.sequence
