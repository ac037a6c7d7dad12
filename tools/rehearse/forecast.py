"""The forecast of a training's memory and work, from the model that it built."""

import argparse
from typing import Any

import torch

GIB = 2**30


def forecast(chunks: list[torch.nn.Module], args: argparse.Namespace, shares: dict[str, float]) -> dict[str, Any]:
    """Return the figures of `tools.cost.parameters.count`, and those of tools/cost for this rank.

    Args:
        chunks: the rank's part of the model.
        args: Megatron's.
        shares: stage of the training → share of the (token, expert) pairs that it computes.

    Returns:
        also "forecast_gib" of each stage of the training, "flops_per_sequence", and the pipeline "stage".
    """
    from megatron.core import parallel_state
    from tools.cost import memory, parameters
    from tools.recipes import flops

    modules = (module for chunk in chunks for module in chunk.modules())
    layers = [one for one in modules if hasattr(one, "layer_number") and hasattr(one, "self_attention")]
    counted, stage = parameters.count(chunks, layers), parallel_state.get_pipeline_model_parallel_rank()
    stages, experts = [counted] * args.pipeline_model_parallel_size, args.num_experts or 0
    return vars(counted) | {
        "stage": stage,
        "forecast_gib": {
            name: sum(memory.stage_memory(args, stages, stage, share * experts)) / GIB for name, share in shares.items()
        },
        "flops_per_sequence": flops.flops_per_sequence(args),
    }
