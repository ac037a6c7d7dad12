"""FLOPs and time of a training."""

import argparse
import copy

from megatron.training.training import num_floating_point_operations

CONVENTION = (
    "A product of m x k and k x n matrices counts 2mnk; backward counts twice forward; attention counts over the whole",
    "square of the sequence, causal or not; the output layer is in; routers, norms and lookups are not.",
)


def flops_per_sequence(args: argparse.Namespace, experts_per_token: float | None = None) -> float:
    """Training FLOPs of one sequence, counted as the paper's table counts them; see `CONVENTION`.

    Args:
        args: Megatron's validated arguments.
        experts_per_token: active experts of a token in each MoE layer; k where None.
    """
    counted = copy.copy(args)
    if experts_per_token is not None:
        counted.moe_router_topk = experts_per_token
    # Megatron halves attention for the causal mask; the paper does not.
    return float(num_floating_point_operations(counted, 1, seqlen_squared_sum_in_batch=2 * args.seq_length**2))
