"""Estimate a run before it starts: parameters, FLOPs, memory per GPU, tokens sent, and hours. Needs no GPU.

remoe cost --gpus 8 -- <flags of pretrain_gpt.py>      or      DRY_RUN=1 bash scripts/train_llama_978m_remoe.sh 8

The hours are FLOPs / (GPUs x peak x MFU). For a model of the step's time, use remoe rehearse or REHEARSE=1.
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
from .gpus import complete_flags, machine_parser, parse_machine

# Percent of the GPU's peak: the worst cases that docs/performance.md expects on 8 H100 for the 182M ReMoE with plain
# PyTorch kernels, and for the 978M with Triton kernels.
MFU = (18.0, 33.0)


def percent(text: str) -> float:
    """Convert to a percentage of at least 1; an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text!r}: give a percentage, 1 to 100")
    return number


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
        raise ValueError("--multi-latent-attention: cannot be estimated, because only plain layers are counted.")
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
    parser = machine_parser("cost", __doc__)
    text = "model FLOPs utilization, from and to: percent of the GPU's dense bf16 peak, 1 to 100, for the hours "
    text += f"(default: {MFU[0]:g} {MFU[1]:g}, as docs/performance.md expects for the paper's models on 8 H100)"
    parser.add_argument("--mfu", type=percent, nargs=2, default=MFU, metavar=("LOW", "HIGH"), help=text)
    options, flags = parse_machine(parser, arguments)
    if options.mfu[0] > options.mfu[1]:
        parser.error(f"--mfu {options.mfu[0]:g} {options.mfu[1]:g}: give the lower percentage first")
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

    gpu_values: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), usage_errors():
        sys.argv = ["pretrain_gpt.py", *complete_flags(flags, read_values(flags))]
        args = parse_args(cpu.add_cpu_argument)
        args.tensorboard_dir, args.wandb_project = None, ""  # set_global_variables would create or contact them
        if not args.cpu:
            fp4 = ("fp4", "fp4_param_gather")  # Megatron refuses these without Transformer Engine
            gpu_values = {name: getattr(args, name) for name in (*cpu.CPU_VALUES, *fp4) if hasattr(args, name)}
            vars(args).update(dict.fromkeys(fp4))
        with contextlib.redirect_stderr(io.StringIO()):
            cpu.adapt_arguments(args, trains=args.cpu)
        resume = choose_checkpoint(args) if args.use_checkpoint_args else None
        if resume:
            resume.apply(args)
        load_saved_args(args, resume)
        validate_args(args, {})
        check_settings(argparse.Namespace(**vars(args) | gpu_values))
        check_sizes(args, gpu_values.get("transformer_impl", args.transformer_impl))
        if gpu_values.get("transformer_impl") == "transformer_engine":
            # Plain layers of multi-token prediction do not support it, and it does not change the parameters.
            gpu_values["sequence_parallel"], args.sequence_parallel = args.sequence_parallel, False
        set_global_variables(args)
        flops_per_sequence(args)  # refuses other layers, such as Mamba
        stages, whole = parameters.count_stages(args), parameters.count_whole_model(args)
        # The estimate uses the GPUs' settings, some of which were switched off to build the model here.
        args = argparse.Namespace(**vars(args) | gpu_values)
        text = "\n".join(estimate.write_lines(args, options, stages, *whole))
    print(text)
    return 0
