"""Define kinds of GPUs by their data sheets, and the flags of `remoe cost` and `remoe rehearse` for a machine."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..console.flags import split, tool_parser, whole_number, without


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        tflops: dense bf16 matrix products in TFLOP/s, without sparsity.
        memory: in GiB: a GPU sold with 80 GB has about 80 GiB.
        title: its name in CUDA.
        capability: compute capability.
        multiprocessors: their number.
        bandwidth: of its memory, in TB/s.
        link: to the other GPUs of a node, in GB/s per direction.
    """

    tflops: float
    memory: float
    title: str
    capability: str
    multiprocessors: int
    bandwidth: float
    link: float


GPUS = {
    "a100": Gpu(312, 80, "NVIDIA A100-SXM4-80GB", "8.0", 108, 2.04, 300),
    "h100": Gpu(989, 80, "NVIDIA H100 80GB HBM3", "9.0", 132, 3.35, 450),
    "h200": Gpu(989, 141, "NVIDIA H200", "9.0", 132, 4.8, 450),
    "b200": Gpu(2250, 180, "NVIDIA B200", "10.0", 148, 8.0, 900),
}
GPUS_PER_NODE = 8
CONTEXT = 0.6  # GiB of a GPU that the driver's context uses
WITHOUT_FILES = "--tokenizer-type NullTokenizer --vocab-size 50257".split()  # the size of GPT-2's vocabulary


def judge_memory(needed: float | None, gpu: Gpu) -> Iterator[str]:
    """Yield how to save memory if a run does not fit, then the verdict. `needed` is in GiB; None if too much."""
    fits = needed is not None and needed <= gpu.memory
    if not fits:
        yield "To fit, choose a smaller micro-batch, more expert, tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."
    amount = "more than" if needed is None else f"{needed:.1f} of"
    yield f"{'Fits' if fits else 'DOES NOT FIT'}: {amount} {gpu.memory:g} GiB"


def format_duration(seconds: float) -> str:
    """Return a duration as text: in minutes below an hour, else in hours, with the days above 48 hours."""
    hours = seconds / 3600
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:.1f} days)" if hours > 48 else "")


def machine_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the command `remoe NAME`, with the options for the machine."""
    parser = tool_parser(name, description)
    parser.usage = "%(prog)s [options] -- Megatron flags"
    add = parser.add_argument
    add("--gpus", type=whole_number(1), default=8, metavar="N", help="GPUs in total (default: 8)")
    add("--gpus-per-node", type=whole_number(1), metavar="N", help=f"GPUs per node (default: at most {GPUS_PER_NODE})")
    add("--gpu", type=str.lower, choices=GPUS, default="h100", help="kind of GPU (default: h100)")
    return parser


def parse_machine(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command's arguments. Return its options, and Megatron's flags after "--"."""
    given, flags = split(arguments)
    options = parser.parse_args(given)
    options.gpus_per_node = options.gpus_per_node or min(GPUS_PER_NODE, options.gpus)
    if options.gpus % options.gpus_per_node:
        parser.error(f"--gpus {options.gpus}: give a multiple of --gpus-per-node {options.gpus_per_node}")
    if not flags:
        parser.error("give Megatron's flags after --")
    if "--use-tp-pp-dp-mapping" in flags:
        parser.error("--use-tp-pp-dp-mapping: only Megatron's default order of ranks is supported. Leave it out")
    return options, flags


def complete_flags(flags: Sequence[str], values: argparse.Namespace) -> list[str]:
    """Return Megatron's `flags` with the last batch size of --step-batch-size-schedule for all steps.

    If GPT-2's files are not given or do not exist yet, the flags set a vocabulary of the same size. `values` are the
    values of `flags`, from `read_values`.
    """
    complete = [*flags]
    if values.step_batch_size_schedule is not None:
        last = values.step_batch_size_schedule.rpartition(":")[2]
        complete = [*without(flags, {"--step-batch-size-schedule"}), "--global-batch-size", last]
    are_there = all(file and os.path.isfile(file) for file in (values.vocab_file, values.merge_file))
    needs_files = values.tokenizer_type in (None, "GPT2BPETokenizer")
    return [*complete, *WITHOUT_FILES] if needs_files and not are_there else complete
