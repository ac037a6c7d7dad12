"""Estimate what a training costs before it starts: parameters, FLOPs, hours, and memory per GPU. Needs no GPU."""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ...console.flags import above_zero, asks_for_gpt2, for_a_plan, split, whole_number
from ...recipes.layout import MOST_EXPERTS
from ...recipes.models import PAPER, ROUTINGS
from . import paper
from .choices import lines as rehearsed_lines
from .gpus import ACCELERATORS, Accelerator


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the tool's own flags, with "accelerator", and Megatron's behind --."""
    parser = argparse.ArgumentParser(
        prog="remoe cost",
        description=__doc__,
        usage="remoe cost --gpus N [--gpu KIND] [--utilization U] -- FLAGS OF pretrain_gpt.py",
        epilog="DRY_RUN=1 bash scripts/train_llama_....sh calls it with the script's flags.",
    )
    add, kinds = parser.add_argument, ", ".join(ACCELERATORS)
    add("--gpus", type=whole_number(1), required=True, help="number of GPUs")
    add("--gpus-per-node", type=whole_number(1), metavar="N", help="default: 8, or all if fewer")
    add("--gpu", default="h100", help=f"kind of GPU, for hours and memory (default: h100): {kinds}")
    add("--tflops", type=above_zero, help="dense bf16 TFLOP/s of a GPU that is not listed")
    add("--memory", type=above_zero, help="GiB of memory of a GPU that is not listed")
    add("--utilization", type=float, default=0.4, help="share of the GPU's rate that training reaches (default: 0.4)")
    add("--paper", nargs=2, metavar=("SIZE", "ROUTING"), help="list differences from the paper's run, e.g. 182m remoe")
    own, flags = split(arguments)
    options = parser.parse_args(own)
    options.gpus_per_node = options.gpus_per_node or min(8, options.gpus)
    if not 0 < options.utilization <= 1:
        parser.error(f"--utilization {options.utilization}: give a share above 0 and up to 1")
    if options.paper and (options.paper[0] not in PAPER or options.paper[1] not in ROUTINGS):
        parser.error(f"--paper {' '.join(options.paper)}: give one of {', '.join(PAPER)} and of {', '.join(ROUTINGS)}")
    known = ACCELERATORS.get(options.gpu.lower(), Accelerator(0, 0))
    options.accelerator = Accelerator(options.tflops or known.tflops, options.memory or known.memory)
    if not (options.accelerator.tflops and options.accelerator.memory):
        parser.error(f"--gpu {options.gpu} is not in the list ({kinds}): choose one, or give --tflops and --memory too")
    return options, flags


def check_sizes(args: argparse.Namespace) -> None:
    """Check sizes with which building the model would crash or hang, and that there is a number of steps.

    Raises:
        ValueError: names the flag, its value and the remedy.
    """
    if not (args.train_iters or args.train_samples):
        raise ValueError("--train-iters is missing. Give it or --train-samples.")
    if (args.num_experts or 0) > MOST_EXPERTS:
        raise ValueError(f"--num-experts: {args.num_experts} of a layer are too many. Give at most {MOST_EXPERTS}.")
    ranks = (args.expert_tensor_parallel_size or args.tensor_model_parallel_size) * args.pipeline_model_parallel_size
    if args.num_experts and args.world_size % (ranks * args.expert_model_parallel_size):
        raise ValueError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: {args.world_size} GPUs are not divisible "
            f"by it times {ranks}, the tensor parallel size of experts times the pipeline stages. Give a smaller one."
        )


def main(arguments: Sequence[str]) -> int:
    """Print the estimate; returns the exit code."""
    options, flags = parse_arguments(arguments)
    # This process stands for the first of all.
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(options.gpus)})
    logging.disable(logging.INFO)
    from ...models.on_cpu import megatron_on_cpu

    megatron_on_cpu()  # even on a machine with GPUs
    from megatron.remoe import cpu
    from megatron.remoe.start.messages import usage_errors
    from megatron.remoe.training.arguments import load_saved_args, parse_args
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from . import estimate, parameters

    sys.argv = ["pretrain_gpt.py", *for_a_plan(flags)]
    planned: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), usage_errors():
        args = parse_args(cpu.add_cpu_argument, {"tokenizer_type": "GPT2BPETokenizer"})
        args.tensorboard_dir, args.wandb_project = None, ""  # the globals below would create or contact them
        given = paper.settings(args)
        if asks_for_gpt2(flags):
            given["tokenizer_type"] = "GPT2BPETokenizer"
        if not args.cpu:
            fp4 = ("fp4", "fp4_param_gather")  # Megatron refuses these without Transformer Engine
            planned = {name: getattr(args, name) for name in (*cpu.CPU_VALUES, *fp4) if hasattr(args, name)}
            vars(args).update(dict.fromkeys(fp4))
        with contextlib.redirect_stderr(io.StringIO()):
            cpu.adapt_arguments(args, trains=args.cpu)
        load_saved_args(args)
        validate_args(args, {})
        check_sizes(args)
        set_global_variables(args)
        stages, total = parameters.stages(args), parameters.total(args)
        # Settings that were switched off to build the model here count as on the GPUs.
        args = argparse.Namespace(**vars(args) | planned)
        text = [*estimate.plan_lines(args, options)]
        different = paper.differences(given, *options.paper) if options.paper else {}
        text += ["", *paper.lines(different, *options.paper)] if options.paper else []
        text += [*estimate.lines(args, options, stages, *total)]
    if options.paper and options.paper[1] == "remoe" and paper.is_papers_step(args, different):
        text += ["", *rehearsed_lines(options.gpu.lower(), options.gpus, options.paper[0], args.moe_kernels)]
    print("\n".join(text))
    return 0
