"""FLOPs of a model, from its run's arguments."""

import argparse
from typing import Any

from ..recipes.flops import flops_per_expert, flops_per_sequence
from ..sweep.stages import Flops

UNKNOWN = Flops(float("nan"), float("nan"))


def count_flops(args: dict[str, Any]) -> Flops:
    """Count the FLOPs of a model with these arguments of Megatron.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: an argument that the count needs is missing
            or has another type.
    """
    if "seq_length" not in args or "hidden_size" not in args:
        raise LookupError("seq_length, hidden_size")
    named = argparse.Namespace(**args)
    return Flops(flops_per_sequence(named), flops_per_expert(named) if args.get("num_experts") else 0.0)
