"""FLOPs of a model, from its run's arguments."""

import argparse
from typing import Any

from ..common.on_cpu import megatron_on_cpu
from ..sweep.stages import Flops

# Off in the authors' fork, whose Megatron does not have them yet.
LATER = (
    *("attention_output_gate", "experimental_attention_variant", "hybrid_layer_pattern"),
    *("moe_latent_size", "mtp_num_layers"),
)
UNKNOWN = Flops(float("nan"), float("nan"))


def count_flops(args: dict[str, Any]) -> Flops:
    """Count the FLOPs of a model with these arguments of Megatron, as tools/cost does.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: an argument that the count needs is missing
            or has another type.
    """
    if "seq_length" not in args or "hidden_size" not in args:
        raise LookupError("seq_length, hidden_size")
    megatron_on_cpu()
    from ..cost.compute import flops_per_sequence

    named = argparse.Namespace(**dict.fromkeys(LATER) | args)
    sequence = flops_per_sequence(named)
    topk = args.get("moe_router_topk") if args.get("num_experts") else None
    return Flops(sequence, flops_per_sequence(named, topk + 1) - sequence if topk else 0.0)
