"""Simulate a training without GPUs and report whether it starts, its memory, waits, launches and collectives.

remoe rehearse --gpus 8 -- <Megatron flags>      or      REHEARSE=1 bash scripts/train_llama_978m_remoe.sh 8

PyTorch, Megatron and this project run as they would on a node, over a no-op CUDA: no GPU is used, nothing
is trained or kept. The times are those of a model, by rates that --rate changes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ...console.flags import above_zero, split, tool_parser, whole_number
from .cards import CARDS, rates

GPUS_PER_NODE = 8


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the tool's own flags, with "rates", and those of the training after "--"."""
    parser = tool_parser("rehearse", __doc__)
    add = parser.add_argument
    add("--gpus", type=whole_number(1), default=8, metavar="N", help="of the whole training (default: 8)")
    add("--gpus-per-node", type=whole_number(1), metavar="N", help=f"default: {GPUS_PER_NODE}, or all if fewer")
    add("--gpu", type=str.lower, choices=CARDS, default="h100", help="the GPU to simulate (default: h100)")
    text = "simulate only this rank (default: the first rank of the first, a middle and the last pipeline stage)"
    add("--rank", type=int, metavar="R", help=text)
    text = "rehearse only this stage of ReMoE's training (default: all, in order; launches and times are the last's)"
    add("--stage", choices=("dense", "way", "steady"), help=text)
    text = "for the model of time: products, grouped, attention (TFLOP/s), bandwidth (TB/s), link, network (GB/s), "
    text += "smallest, latency, network_latency, frame, launch (microseconds)"
    add("--rate", action="append", default=[], metavar="NAME=VALUE", help=text)
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--log", type=Path, metavar="FILE", help="keep the output of rank R in FILE.rankR")
    own, flags = split(arguments)
    options = parser.parse_args(own)
    options.gpus_per_node = options.gpus_per_node or min(GPUS_PER_NODE, options.gpus)
    if options.gpus % options.gpus_per_node:
        parser.error(f"--gpus {options.gpus}: give a multiple of --gpus-per-node {options.gpus_per_node}")
    if options.rank is not None and not 0 <= options.rank < options.gpus:
        parser.error(f"--rank {options.rank}: give a number below {options.gpus}")
    if not flags:
        parser.error("give the training's flags behind --")
    options.rates = rates(options.gpu)
    for rate in options.rate:
        name, _, value = rate.partition("=")
        if name not in options.rates:
            parser.error(f"--rate {rate}: is none of {', '.join(options.rates)}")
        try:
            options.rates[name] = above_zero(value)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--rate {rate}: {error}")
    return options, flags
