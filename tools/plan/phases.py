"""Divide a run into phases by the number of experts that a token uses."""

import argparse

DENSE_SHARE = 0.5  # share of the experts that is active before training
BELOW_LIMIT = 0.9  # share of the activation limit up to which no layer of a rehearsal works in chunks
TITLES = {"dense": "dense start", "way": "on the way", "steady": "at the target"}


def experts_by_phase(args: argparse.Namespace) -> dict[str, float]:
    """Return the phases of a run: phase → experts computed per token in every MoE layer.

    The phases are the dense start, the moment when layers stop using chunks ("way") if the start uses them, and the
    rest ("steady"). Top-k has a dense start only with --moe-warmup-topk.

    Args:
        args: Megatron's arguments. Before validation, granularity is missing, and only the phases' names are right.
    """
    topk = float(args.moe_router_topk) if args.num_experts else 0.0
    if not (args.num_experts and args.moe_relu_routing):
        return ({"dense": float(args.moe_warmup_topk)} if args.moe_warmup_topk else {}) | {"steady": topk}
    dense = max(topk, min(DENSE_SHARE * args.num_experts, args.moe_relu_max_experts or args.num_experts))
    limit = args.moe_relu_activation_limit * topk
    way = {"way": BELOW_LIMIT * limit} if topk < limit < dense else {}
    return {"dense": dense, **way, "steady": topk}
