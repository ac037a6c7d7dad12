"""Define the phases of a run in which a GPU's memory and time differ, for estimates and rehearsals."""

import argparse

DENSE_SHARE = 0.5  # of the experts that are active before training
BELOW_LIMIT = 0.9  # of the bound on activations: the most at which no layer of a rehearsal works in chunks
TITLES = {"dense": "dense start", "way": "on the way", "steady": "at the target"}


def experts_by_phase(args: argparse.Namespace) -> dict[str, float]:
    """Return the phases of a run, and the experts that each computes per token in every MoE layer.

    The phases are the dense start, the moment when layers stop using chunks ("way") if the start uses them, and the
    rest ("steady"). Only ReLU routing has more than one phase.

    Args:
        args: Megatron's validated arguments.
    """
    topk = float(args.moe_router_topk) if args.num_experts else 0.0
    if not (args.num_experts and args.moe_relu_routing):
        return {"steady": topk}
    dense = max(topk, min(DENSE_SHARE * args.num_experts, args.moe_relu_max_experts or args.num_experts))
    limit = args.moe_relu_activation_limit * topk
    way = {"way": BELOW_LIMIT * limit} if topk < limit < dense else {}
    return {"dense": dense, **way, "steady": topk}
