"""Run Megatron's training loop on a machine without an accelerator.

Active only without an accelerator or with --cpu. `facade` explains how it works; `engine` lists each change to
Megatron with its reason.
"""

import argparse
import os

import torch

from megatron.remoe.cpu.engine import install
from megatron.remoe.cpu.flags import CPU_VALUES, adapt_arguments

__all__ = ["CPU_VALUES", "adapt_arguments", "add_cpu_argument", "install", "is_wanted"]

CPU_FLAG = "--cpu"


def is_wanted(command_line: list[str]) -> bool:
    """Return whether to train on the CPU: the user asks for it, or this is the only node and has no accelerator."""
    # Without torchrun, as with one srun task per GPU, a rank does not know whether others have accelerators.
    is_only_node = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")
    return CPU_FLAG in command_line or (is_only_node and not torch.cuda.is_available())


def add_cpu_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --cpu to Megatron's parser."""
    parser.add_argument_group("CPU").add_argument(
        CPU_FLAG,
        action="store_true",
        help="Train on the CPU even if there is an accelerator (the default on a single node without one).",
    )
    return parser
