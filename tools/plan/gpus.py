"""Define kinds of GPUs by their data sheets, the rates of the time model, and the flags for both."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..console.flags import above_zero, split, tool_parser, whole_number, without


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
# Shares of the data sheet's figures, until --rate gives measured rates. Bandwidth: copies on H100 and H200 with PyTorch
# 2.11 reach 3.0 and 4.3 TB/s. Grouped: Transformer Engine's product of 8 experts, 509 to 650 TFLOP/s on H100
# (NVIDIA/TransformerEngine#2045). Products, and attention at head size 128: assumed, between published figures.
SHARES = {"products": 0.57, "grouped": 0.57, "attention": 0.46, "bandwidth": 0.9, "link": 0.8}
NETWORK = 50.0  # GB/s per direction from each GPU to other nodes: 400 Gbit/s
SMALLEST = 2.3  # microseconds of the shortest kernel
# Assumed microseconds of a collective per doubling of its ranks, as in a tree: within a node, and between nodes.
LATENCY, NETWORK_LATENCY = 5.0, 10.0
# Microseconds of the host for each call of a Python function, and for each launch with PyTorch's work around it. They
# are fitted to the CPU time of two 182M steps over the no-op CUDA on an AMD EPYC Zen 5 with Python 3.13: 103 ms with
# 73,400 calls and 4,783 launches, and 123 ms with 43,600 and 9,603. The hosts of H100s take HOST times as long: 114 ns
# for a call that takes the EPYC 77 to 98 (pytorch/pytorch#187862), and 8.7 µs, driver included, for a Triton launch
# that takes it 5.2 (vllm-project/vllm#34838). DRIVER, the time of the launch itself, is assumed.
FRAME, LAUNCH, HOST, DRIVER = 0.8, 9.0, 1.3, 2.0

WITHOUT_FILES = "--tokenizer-type NullTokenizer --vocab-size 50257".split()  # the size of GPT-2's vocabulary


def rates(name: str) -> dict[str, float]:
    """Return the rates of the time model for a kind of GPU.

    Returns:
        name → rate: products, grouped, attention in TFLOP/s; bandwidth in TB/s; link, network in GB/s; the others in
        microseconds.
    """
    gpu = GPUS[name]
    figures = {kind: SHARES[kind] * gpu.tflops for kind in ("products", "grouped", "attention")}
    figures |= {"bandwidth": SHARES["bandwidth"] * gpu.bandwidth, "link": SHARES["link"] * gpu.link}
    figures |= {"network": NETWORK, "smallest": SMALLEST, "latency": LATENCY, "network_latency": NETWORK_LATENCY}
    figures |= {"frame": HOST * FRAME, "launch": HOST * LAUNCH + DRIVER}
    return {kind: round(rate, 3) for kind, rate in figures.items()}


def read_rate(text: str) -> tuple[str, float]:
    """Convert NAME=VALUE to a rate's name and value; an argparse type."""
    name, _, value = text.partition("=")
    if name not in rates("h100"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose a name from {', '.join(rates('h100'))}")
    return name, above_zero(value)


def plan_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the command `remoe NAME`, with the options for the machine and the rates."""
    parser = tool_parser(name, description)
    parser.usage = "%(prog)s [options] -- Megatron flags"
    add = parser.add_argument
    add("--gpus", type=whole_number(1), default=8, metavar="N", help="GPUs in total (default: 8)")
    add("--gpus-per-node", type=whole_number(1), metavar="N", help=f"GPUs per node (default: at most {GPUS_PER_NODE})")
    add("--gpu", type=str.lower, choices=GPUS, default="h100", help="kind of GPU (default: h100)")
    text = "set a rate of the time model: products, grouped, attention (TFLOP/s), bandwidth (TB/s), link, network "
    text += "(GB/s), smallest, latency, network_latency, frame, launch (microseconds)"
    add("--rate", type=read_rate, action="append", default=[], metavar="NAME=VALUE", help=text)
    return parser


def parse_plan(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of a plan. Return its options, with `rates` added, and Megatron's flags after "--"."""
    given, flags = split(arguments)
    options = parser.parse_args(given)
    options.gpus_per_node = options.gpus_per_node or min(GPUS_PER_NODE, options.gpus)
    if options.gpus % options.gpus_per_node:
        parser.error(f"--gpus {options.gpus}: give a multiple of --gpus-per-node {options.gpus_per_node}")
    if not flags:
        parser.error("give Megatron's flags after --")
    if "--use-tp-pp-dp-mapping" in flags:
        parser.error("--use-tp-pp-dp-mapping: a plan assumes Megatron's default order of ranks. Leave it out")
    options.rates = rates(options.gpu) | dict(options.rate)
    return options, flags


def planned_flags(flags: Sequence[str], values: argparse.Namespace) -> list[str]:
    """Return Megatron's `flags` with the last batch size of --step-batch-size-schedule for all steps.

    If GPT-2's files are not given or do not exist yet, the flags set a vocabulary of the same size. `values` are the
    values of `flags`, from `read_values`.
    """
    planned = [*flags]
    if values.step_batch_size_schedule is not None:
        last = values.step_batch_size_schedule.rpartition(":")[2]
        planned = [*without(flags, {"--step-batch-size-schedule"}), "--global-batch-size", last]
    are_there = all(file and os.path.isfile(file) for file in (values.vocab_file, values.merge_file))
    needs_files = values.tokenizer_type in (None, "GPT2BPETokenizer")
    return [*planned, *WITHOUT_FILES] if needs_files and not are_there else planned
