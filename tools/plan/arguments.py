"""Define the flags that `remoe cost` and `remoe rehearse` share."""

import argparse
from collections.abc import Sequence

from ..console.flags import above_zero, split, tool_parser, whole_number
from .gpus import GPUS, rates

GPUS_PER_NODE = 8


def plan_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command `remoe NAME`, with the flags of machine and rates."""
    parser = tool_parser(name, description)
    add = parser.add_argument
    add("--gpus", type=whole_number(1), default=8, metavar="N", help="of the whole run (default: 8)")
    add("--gpus-per-node", type=whole_number(1), metavar="N", help=f"default: {GPUS_PER_NODE}, or all if fewer")
    add("--gpu", type=str.lower, choices=GPUS, default="h100", help="kind of GPU (default: h100)")
    text = "for the model of time: products, grouped, attention (TFLOP/s), bandwidth (TB/s), link, network (GB/s), "
    text += "smallest, latency, network_latency, frame, launch (microseconds)"
    add("--rate", action="append", default=[], metavar="NAME=VALUE", help=text)
    return parser


def parse_plan(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return a command's own flags, with "rates", and Megatron's, which follow "--"."""
    given, flags = split(arguments)
    options = parser.parse_args(given)
    options.gpus_per_node = options.gpus_per_node or min(GPUS_PER_NODE, options.gpus)
    if options.gpus % options.gpus_per_node:
        parser.error(f"--gpus {options.gpus}: give a multiple of --gpus-per-node {options.gpus_per_node}")
    if not flags:
        parser.error("give Megatron's flags after --")
    options.rates = rates(options.gpu)
    for rate in options.rate:
        name, _, value = rate.partition("=")
        if name not in options.rates:
            parser.error(f"--rate {rate}: choose a name from {', '.join(options.rates)}")
        try:
            options.rates[name] = above_zero(value)
        except argparse.ArgumentTypeError as error:
            parser.error(f"--rate {rate}: {error}")
    return options, flags
