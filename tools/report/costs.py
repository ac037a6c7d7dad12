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
    batch = run.args.get("global_batch_size")
    timed = {at: row for at, row in run.rows.items() if row.get("seconds_per_iteration") is not None}
    if not timed or batch is None:
        return []
    if run.target is None:
        before = [0, *timed]
        steps = [at - earlier for earlier, at in zip(before, timed, strict=False)]
        seconds = sum(n * row["seconds_per_iteration"] for n, row in zip(steps, timed.values(), strict=True))
        return [Stage("all", 1, run.last, seconds / 3600, batch * run.last * flops.sequence, run.topk or 0)]
    records = {
        at: {
            "sparsity": str(row["sparsity"]),
            "elapsed time per iteration (ms)": str(1000 * row["seconds_per_iteration"]),
            "global batch size": str(batch),
        }
        for at, row in timed.items()
        if row.get("sparsity") is not None
    }
    return stages(records, run.target, run.num_experts, flops)
