"""Adapt Megatron to run without an accelerator. A comment gives the reason for each change."""

import ctypes
import os
import sys
from typing import Any

import torch

from megatron.remoe.cpu import facade
from megatron.remoe.cpu.collectives import with_padding

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def install() -> None:
    """Make Megatron run on the CPU in this process. Call it before anything else of Megatron is imported."""
    # Megatron decorates small functions with torch.compile, which needs a C++ compiler and a minute on a CPU.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron requires it for tensor parallelism. It orders CUDA kernels and has no effect here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Use huge pages for large tensors. Without them, steps took up to four times as long on a virtual machine.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if facade.install_facade():
        # Adam's averages for inactive experts decay to denormal numbers, which make its step five times as slow.
        torch.set_flush_denormal(True)
        _keep_freed_memory()
        _adapt_tensors()
        _adapt_modules()


def _keep_freed_memory() -> None:
    """Keep glibc from returning large buffers to the system only to request them again for the next layer."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _adapt_tensors() -> None:
    # Megatron moves tensors to the accelerator with this method; here they stay.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda *_args: None  # type: ignore[method-assign]
    stock_type = torch.Tensor.type

    def type_name_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = stock_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    # Optimizers check parameters by the name of the type, "torch.cuda.FloatTensor".
    torch.Tensor.type = type_name_or_cast  # type: ignore[method-assign, assignment]


def _adapt_modules() -> None:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import initialize

    # Megatron reaches the generator's state through CUDA's internals.
    tensor_parallel_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    # Megatron turns split sizes into host values only on a CUDA device, and the all-to-all does not accept tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    # gloo gathers only equal parts; experts that are split over tensor parallel ranks gather unequal ones.
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = with_padding(
        mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    )
    # This function warms up fused kernels, which do not exist here.
    initialize._warmup_jit_function = lambda *_args, **_kwargs: None


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
