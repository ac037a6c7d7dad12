"""Stages of a run with their hours and FLOPs, as the paper's table 6 has them."""

import argparse
from typing import Any

from ..common.on_cpu import megatron_on_cpu
from ..sweep.stages import Flops, Stage, stages
from .reading import Run

# Off in the authors' fork, whose Megatron does not have them yet.
LATER = (
    *("attention_output_gate", "experimental_attention_variant", "hybrid_layer_pattern"),
    *("moe_latent_size", "mtp_num_layers"),
)
UNKNOWN = Flops(float("nan"), float("nan"))


def count_flops(args: dict[str, Any]) -> Flops:
    """Of a model with these arguments of Megatron, counted as tools/cost counts them.

    Raises:
        AttributeError, TypeError: an argument that the count needs is not there.
    """
    megatron_on_cpu()
    from ..cost.compute import flops_per_sequence

    named = argparse.Namespace(**dict.fromkeys(LATER) | args)
    sequence = flops_per_sequence(named)
    topk = args.get("moe_router_topk") if args.get("num_experts") else None
    return Flops(sequence, flops_per_sequence(named, topk + 1) - sequence if topk else 0.0)


def stages_of(run: Run, flops: Flops) -> list[Stage]:
    """ReMoE's three stages, as far as the run is; of other models all iterations as one."""
    timed = {at: row for at, row in run.rows.items() if row.get("seconds_per_iteration") and run.batch_of(row)}
    if not timed:
        return []
    if run.target is None:
        seconds = sequences = before = 0
        for at, row in timed.items():
            seconds += (at - before) * row["seconds_per_iteration"]
            sequences += (at - before) * (run.batch_of(row) or 0)
            before = at
        return [Stage("all", 1, before, seconds / 3600, sequences * flops.sequence, run.topk or 0)]
    records = {
        at: {
            "sparsity": str(row["sparsity"]),
            "elapsed time per iteration (ms)": str(1000 * row["seconds_per_iteration"]),
            "global batch size": str(run.batch_of(row)),
        }
        for at, row in timed.items()
        if row.get("sparsity") is not None
    }
    return stages(records, run.target, run.num_experts, flops)
