"""Count the operations of a step by kind, with the bytes and FLOPs of each; their times are those of step_time.py."""

import argparse
import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .step_time import attention_share, grouped_share
from .transformer_engine import Calls, iterate_tensors

# Operations that move nothing.
FREE = set(
    "view transpose t permute slice select split unbind expand as_strided alias detach unsqueeze squeeze _unsafe_view "
    "chunk reshape lift_fresh view_as split_with_sizes tensor_split _local_scalar_dense empty empty_like new_empty "
    "empty_strided record_stream is_pinned _pin_memory set_ resize_ _reshape_alias new_empty_strided unfold".split()
)
FILLS = set("zeros zeros_like new_zeros zero_ fill_ full ones ones_like full_like new_full".split())
PRODUCTS = set("mm addmm addmm_ bmm baddbmm baddbmm_".split())
TRAFFIC = "memory traffic"


class Roofline(TorchDispatchMode):
    """Adds up the operations on a GPU by kind: products, grouped products, attention and memory traffic.

    Args:
        args: Megatron's, for the sizes of experts and heads.
        rates: see `gpus.rates`.
        engine: Transformer Engine's functions.

    Attributes:
        parts: kind → number of "operations", their "bytes", "flops" and "seconds".
    """

    def __init__(self, args: argparse.Namespace, rates: dict[str, float], engine: Calls) -> None:
        super().__init__()
        self._args, self._rates, self._engine = args, rates, engine
        self.parts: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "Roofline":
        """Watch the functions that bypass PyTorch's dispatch, until the process ends."""
        from triton.compiler import CompiledKernel

        self._engine.tell = self.add
        CompiledKernel.launch_metadata = self._watched(CompiledKernel.launch_metadata)
        return super().__enter__()

    def _watched(self, real: Any) -> Any:
        """Wrap the function that Triton calls before each launch, with the kernel's arguments."""

        def launch_metadata(kernel: Any, grid: Any, stream: Any, *values: Any) -> Any:
            arguments = dict(zip(kernel.src.fn.arg_names, values, strict=True))
            describe = kernel.src.fn.launch_metadata
            work = describe(grid, kernel.metadata, arguments) if describe else {}
            one_pass = sum(_size(value) for value in arguments.values() if torch.is_tensor(value))
            self.add(work.get("bytes", one_pass), work.get("flops", 0.0), "products")
            return real(kernel, grid, stream, *values)

        return launch_metadata

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[-1]
        if name in FREE or "c10d" in function._schema.name:
            return result
        given = [*args, *(value for key, value in (kwargs or {}).items() if key not in ("out", "grad_input"))]
        inputs, outputs = list(iterate_tensors(given)), list(iterate_tensors(result))
        outputs = outputs or inputs[:1]
        if any(tensor.is_cuda for tensor in (*inputs, *outputs)):
            flops, rate = _flops(name, inputs)
            share = grouped_share(self._args) if rate == "grouped" else 1.0
            self.add(_bytes(name, inputs, outputs), flops, rate, share)
        return result

    def add(self, moved: float, flops: float, rate: str, share: float = 1.0) -> None:
        """Add an operation that moves these bytes and takes these FLOPs, at a share of a rate."""
        seconds = max(moved / (self._rates["bandwidth"] * 1e12), self._rates["smallest"] * 1e-6)
        if rate == "attention":
            share = attention_share(self._args)
        if flops:
            seconds = max(seconds, flops / (share * self._rates[rate] * 1e12))
        work = {"operations": 1, "bytes": moved, "flops": flops, "seconds": seconds}
        before = self.parts.get(rate if flops else TRAFFIC, dict.fromkeys(work, 0))
        self.parts[rate if flops else TRAFFIC] = {name: before[name] + number for name, number in work.items()}


def _size(tensor: torch.Tensor) -> int:
    """Return the bytes in memory, where expanded dimensions exist once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or size == 0) * tensor.element_size()


def _flops(name: str, inputs: list[torch.Tensor]) -> tuple[float, str]:
    """Return the FLOPs, and the rate that applies to them."""
    if name in PRODUCTS:
        left, right = [tensor for tensor in inputs if tensor.dim() >= 2][-2:]
        return 2.0 * math.prod(left.shape) * right.shape[-1], "products"
    if "grouped_mm" in name:
        return 2.0 * math.prod(inputs[0].shape) * inputs[1].shape[-1], "grouped"
    if "attention" in name:
        is_backward = "backward" in name
        batch, heads, sequence, size = inputs[1 if is_backward else 0].shape
        return (5.0 if is_backward else 2.0) * batch * heads * sequence * sequence * size, "attention"  # causal: half
    return 0.0, ""


def _bytes(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> float:
    if name in ("index_select", "gather", "embedding"):
        indices = (_size(tensor) for tensor in inputs[1:] if not tensor.is_floating_point())
        return 2 * sum(map(_size, outputs)) + sum(indices)
    if name in ("index_add_", "scatter_add_", "index_add"):
        return 3 * _size(inputs[-1])
    if name in FILLS:
        return sum(map(_size, outputs))
    return sum(map(_size, inputs)) + sum(map(_size, outputs))
