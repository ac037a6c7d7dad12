"""Tests of megatron/remoe/kernels, in Triton's interpreter if there is no GPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rounding(dtype: torch.dtype) -> float:
    """Return the relative rounding error of a type: the interpreter truncates to bf16, a GPU rounds."""
    return torch.finfo(dtype).eps * (0.51 if DEVICE == "cuda" else 1.0)
