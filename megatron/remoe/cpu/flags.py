"""Set the flags of Megatron that need other values without an accelerator."""

import argparse
import os
import sys

import torch

# attribute: (value on the CPU, reason); these are on by default, so the user did not ask for them
SILENT: dict[str, tuple[object, str]] = {
    "distributed_backend": ("gloo", "NCCL needs GPUs"),
    "transformer_impl": ("local", "Transformer Engine needs a GPU"),
    "gradient_accumulation_fusion": (False, "a CUDA kernel of apex"),
    "no_persist_layer_norm": (True, "a CUDA kernel of apex"),
    "masked_softmax_fusion": (False, "a CUDA kernel"),
    "apply_rope_fusion": (False, "a CUDA kernel of Transformer Engine"),
    "bias_gelu_fusion": (False, "torch.compile fuses it, and is off"),
    "bias_swiglu_fusion": (False, "torch.compile fuses it, and is off"),
    "bias_dropout_fusion": (False, "torch.compile fuses it, and is off"),
}
CPU_VALUES = SILENT | {
    "moe_grouped_gemm": (False, "a CUDA kernel of Transformer Engine"),
    "moe_permute_fusion": (False, "a CUDA kernel of Transformer Engine"),
    "cross_entropy_loss_fusion": (False, "a CUDA kernel"),
    "tp_comm_overlap": (False, "part of Transformer Engine"),
    "use_flash_attn": (False, "flash-attn needs a GPU"),
}


def adapt_arguments(args: argparse.Namespace, trains: bool = True) -> None:
    """Set the flags for the CPU, and print which of the user's flags are turned off.

    Args:
        args: Megatron's arguments, not yet validated.
        trains: whether the caller trains a model; if not, number formats are not checked.

    Raises:
        ValueError: the user asked for a number format that only accelerators have.
    """
    for name in ("fp16", "fp8", "fp4") if trains else ():
        if getattr(args, name, None):
            raise ValueError(f"--{name} needs an accelerator. On the CPU train in fp32 (the default) or with --bf16.")
    if not os.path.isdir("/proc/self/fd"):  # missing on macOS; Megatron's data loader workers read it
        args.num_workers = 0
    if trains and args.rank == 0 and not getattr(args, "cpu", True):
        print(f"No GPU with a driver for PyTorch's CUDA {torch.version.cuda}: training on the CPU.", file=sys.stderr)
    changed = {name: reason for name, (value, reason) in CPU_VALUES.items() if getattr(args, name, value) != value}
    vars(args).update({name: CPU_VALUES[name][0] for name in changed})
    named = [f"--{name.replace('_', '-')} ({changed[name]})" for name in changed if name not in SILENT]
    if named and args.rank == 0:
        print(f"Training on the CPU without {', '.join(named)}.", file=sys.stderr, flush=True)
