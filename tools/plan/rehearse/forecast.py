"""Forecast a training's memory and work from the model that it built."""

import argparse
from typing import Any

import torch

GIB = 2**30


def forecast(chunks: list[torch.nn.Module], args: argparse.Namespace, shares: dict[str, float]) -> dict[str, Any]:
    """Return the figures of `tools.plan.cost.parameters.count`, and those of remoe cost for this rank.

    Args:
        chunks: the rank's part of the model.
        args: Megatron's.
        shares: stage of the training → share of the (token, expert) pairs that it computes.

    Returns:
        also "forecast_gib" of each stage of the training, "flops_per_sequence" (None if the model has layers that are
        not counted), the pipeline "stage", and "bubble": how many times as long its idle time makes the step.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from tools.plan.cost import memory, parameters
    from tools.recipes import flops

    counted, stage = parameters.count(chunks), parallel_state.get_pipeline_model_parallel_rank()
    stages, experts = [counted] * args.pipeline_model_parallel_size, args.num_experts or 0
    try:
        per_sequence = flops.flops_per_sequence(args)
    except ValueError:
        per_sequence = None
    steps = get_num_microbatches() * (args.virtual_pipeline_model_parallel_size or 1)
    return vars(counted) | {
        "stage": stage,
        "forecast_gib": {
            name: sum(memory.stage_memory(args, stages, stage, share * experts)) / GIB for name, share in shares.items()
        },
        "flops_per_sequence": per_sequence,
        "bubble": (steps + len(stages) - 1) / steps,
    }
