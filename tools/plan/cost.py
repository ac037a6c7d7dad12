"""Estimate a run before it starts: parameters, FLOPs, memory per GPU, and hours. Needs no GPU.

remoe cost --gpus 8 -- <flags of pretrain_gpt.py>      or      DRY_RUN=1 bash scripts/train_llama_978m_remoe.sh 8
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..recipes.flops import flops_per_sequence
from ..recipes.megatron_values import read_values
from .gpus import parse_plan, plan_parser, planned_flags


def check_sizes(args: argparse.Namespace, layers: str) -> None:
    """Refuse a missing number of steps, and sizes with which building the model or training would fail.

    Args:
        args: Megatron's validated arguments.
        layers: value of --transformer-impl on the GPUs.

    Raises:
        ValueError: names the flag, its value and the remedy.
    """
    if not (args.train_iters or args.train_samples):
        raise ValueError("--train-iters is missing. Give it or --train-samples.")
    if args.multi_latent_attention:
        raise ValueError("--multi-latent-attention: cannot be planned, because only plain layers are counted.")
    if args.context_parallel_size > 1 and layers == "local":
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size} cannot be used with --transformer-impl local. "
            "Give --transformer-impl transformer_engine."
        )
    ranks = (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) * args.pipeline_model_parallel_size
    if args.num_experts and args.world_size % (ranks * args.expert_model_parallel_size):
        raise ValueError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: {args.world_size} GPUs are not divisible "
            f"by it times {ranks}, the tensor parallel size of experts times the pipeline stages. Give a smaller one."
        )


def main(arguments: Sequence[str]) -> int:
    """Print the estimate; return the exit code."""
    options, flags = parse_plan(plan_parser("cost", __doc__), arguments)
    # This process is the first rank.
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(options.gpus)})
    logging.disable(logging.INFO)
    from ..recipes.on_cpu import megatron_on_cpu

    megatron_on_cpu()  # even on a machine with GPUs
    from megatron.remoe import cpu
    from megatron.remoe.start.checkpoint_files import choose_checkpoint
    from megatron.remoe.start.checks import check_settings
    from megatron.remoe.start.messages import usage_errors
    from megatron.remoe.training.arguments import load_saved_args, parse_args
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from . import estimate, parameters

    planned: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), usage_errors():
        sys.argv = ["pretrain_gpt.py", *planned_flags(flags, read_values(flags))]
        args = parse_args(cpu.add_cpu_argument)
        args.tensorboard_dir, args.wandb_project = None, ""  # set_global_variables would create or contact them
        if not args.cpu:
            fp4 = ("fp4", "fp4_param_gather")  # Megatron refuses these without Transformer Engine
            planned = {name: getattr(args, name) for name in (*cpu.CPU_VALUES, *fp4) if hasattr(args, name)}
            vars(args).update(dict.fromkeys(fp4))
        with contextlib.redirect_stderr(io.StringIO()):
            cpu.adapt_arguments(args, trains=args.cpu)
        resume = choose_checkpoint(args) if args.use_checkpoint_args else None
        if resume:
            resume.apply(args)
        load_saved_args(args, resume)
        validate_args(args, {})
        check_settings(argparse.Namespace(**vars(args) | planned))
        check_sizes(args, planned.get("transformer_impl", args.transformer_impl))
        if planned.get("transformer_impl") == "transformer_engine":
            # Plain layers of multi-token prediction do not support it, and it does not change the parameters.
            planned["sequence_parallel"], args.sequence_parallel = args.sequence_parallel, False
        set_global_variables(args)
        flops_per_sequence(args)  # refuses other layers, such as Mamba
        stages, whole = parameters.count_stages(args), parameters.count_whole_model(args)
        # The estimate uses the GPUs' settings, some of which were switched off to build the model here.
        args = argparse.Namespace(**vars(args) | planned)
        text = "\n".join(estimate.write_lines(args, options, stages, *whole))
    print(text)
    return 0
