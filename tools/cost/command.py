"""What a training will cost, before it is started: parameters, FLOPs, hours, and memory per GPU. Needs no GPU."""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from ..common.flags import OF_GPT2S_SIZE, split, whole_number
from . import paper
from .choices import lines as rehearsed_lines
from .gpus import ACCELERATORS, Accelerator


def build_parser() -> argparse.ArgumentParser:
    """The tool's own flags; Megatron's stand behind --."""
    parser = argparse.ArgumentParser(
        prog="tools/cost",
        description=__doc__,
        usage="python tools/cost --gpus N [--gpu KIND] [--utilization U] -- FLAGS OF pretrain_gpt.py",
        epilog="DRY_RUN=1 bash scripts/train_llama_....sh calls it with the script's flags.",
    )
    parser.add_argument("--gpus", type=whole_number(1), required=True, help="number of GPUs")
    parser.add_argument(
        "--gpu", default="h100", help=f"kind of GPU, for hours and memory (default h100): {', '.join(ACCELERATORS)}"
    )
    parser.add_argument("--tflops", type=float, help="its dense bf16 TFLOP/s, for a kind that is not listed")
    parser.add_argument("--memory", type=float, help="its memory in GiB, for a kind that is not listed")
    parser.add_argument(
        "--utilization", type=float, default=0.4, help="share of that rate which the training reaches (default 0.4)"
    )
    parser.add_argument(
        "--paper",
        nargs=2,
        metavar=("SIZE", "ROUTING"),
        help="tell what differs from the paper's run, for instance: 182m remoe",
    )
    parser.add_argument("--json", action="store_true", help="print FLOPs and parameters alone, as JSON")
    return parser


def accelerator(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Accelerator:
    """The accelerator that the flags name."""
    known = ACCELERATORS.get(options.gpu.lower())
    if known is None and not (options.tflops and options.memory):
        parser.error(
            f"--gpu {options.gpu} is not in the list ({', '.join(ACCELERATORS)}): take one of it, or give --tflops "
            "and --memory too"
        )
    rate = options.tflops or (known.tflops if known else 0)
    return Accelerator(rate, options.memory or (known.memory if known else 0))


def asks_for_gpt2(flags: list[str]) -> bool:
    """Whether GPT-2's tokenizer is asked for, the entry's default, which is built as another type from two files."""
    given = [flags[i + 1] for i, name in enumerate(flags[:-1]) if name == "--tokenizer-type"]
    return given[-1:] in ([], ["GPT2BPETokenizer"])


def without_missing_vocabulary(flags: list[str]) -> list[str]:
    """Let a vocabulary of GPT-2's size stand in where its files are not there yet."""
    named = {name: flags[i + 1] for i, name in enumerate(flags[:-1]) if name in ("--vocab-file", "--merge-file")}
    if not asks_for_gpt2(flags) or all(Path(path).is_file() for path in named.values()):
        return flags
    return [*flags, *OF_GPT2S_SIZE]


def main() -> int:
    """Print the estimate; returns the exit code."""
    own, flags = split(sys.argv[1:])
    parser = build_parser()
    options = parser.parse_args(own)
    if not 0 < options.utilization <= 1:
        parser.error(f"--utilization {options.utilization}: give a share above 0 and up to 1")
    if options.paper and (options.paper[0] not in paper.SIZES or options.paper[1] not in paper.ROUTINGS):
        choices = f"a size of {', '.join(paper.SIZES)} and a routing of {', '.join(paper.ROUTINGS)}"
        parser.error(f"--paper {' '.join(options.paper)}: give {choices}")
    gpu = accelerator(parser, options)

    # One process stands for the first of all.
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(options.gpus)})
    logging.disable(logging.INFO)
    from ..common.on_cpu import megatron_on_cpu

    megatron_on_cpu()  # where the estimate itself always runs
    from megatron.remoe import cpu
    from megatron.remoe.preflight.messages import usage_errors
    from megatron.remoe.training.arguments import parse_args, take_saved_args
    from megatron.training.arguments import validate_args
    from megatron.training.global_vars import set_global_variables

    from . import estimate, parameters

    flags_used = without_missing_vocabulary(flags)
    given: dict[str, Any] = {}
    planned: dict[str, Any] = {}

    def adapt(args: argparse.Namespace) -> None:
        given.update(paper.settings(args))
        if asks_for_gpt2(flags):
            given["tokenizer_type"] = "GPT2BPETokenizer"
        if not args.cpu:
            planned.update({name: getattr(args, name) for name in cpu.CPU_VALUES if hasattr(args, name)})
        with contextlib.redirect_stderr(io.StringIO()):
            cpu.adapt_arguments(args)

    sys.argv = ["pretrain_gpt.py", *flags_used]
    plan = estimate.Plan(
        options.gpus, options.gpu, gpu, options.utilization, tuple(options.paper) if options.paper else None
    )
    with contextlib.redirect_stdout(io.StringIO()), usage_errors():
        args = parse_args(cpu.add_cpu_argument, {"tokenizer_type": "GPT2BPETokenizer"})
        args.tensorboard_dir, args.wandb_project = None, ""  # which would be made, or asked, by the globals below
        adapt(args)
        take_saved_args(args)
        validate_args(args, {})
        set_global_variables(args)
        stages, total = parameters.stages(args), parameters.total(args)
    if options.json:
        print(json.dumps(estimate.figures(args, *total)))
        return 0
    # What was switched off for building the model here counts as it will be there.
    text = [*estimate.lines(argparse.Namespace(**vars(args) | planned), given, plan, stages, total)]
    if options.paper and options.paper[1] == "remoe":
        text += ["", *rehearsed_lines(options.gpu.lower(), options.gpus, options.paper[0], args.moe_kernels)]
    print("\n".join(text))
    return 0
