"""Tests of megatron/remoe/kernels, through Triton's interpreter where there is no GPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rounding(dtype: torch.dtype) -> float:
    """By how much a number of this type may be off: the interpreter cuts bf16 off where a GPU rounds."""
    return torch.finfo(dtype).eps * (0.51 if DEVICE == "cuda" else 1.0)
