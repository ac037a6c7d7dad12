"""Count a step's operations by kind, with their bytes, FLOPs and modelled seconds.

Calls of Transformer Engine are counted where Python makes them. cuDNN's attention is replaced.
"""

import argparse
import ctypes
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .step_time import attention_share, grouped_share

# Operations that move no data on the device.
FREE = set(
    "view transpose t permute slice select split unbind expand as_strided alias detach unsqueeze squeeze _unsafe_view "
    "chunk reshape lift_fresh view_as split_with_sizes tensor_split _local_scalar_dense empty empty_like new_empty "
    "empty_strided record_stream is_pinned _pin_memory set_ resize_ _reshape_alias new_empty_strided unfold".split()
)
FILLS = set("zeros zeros_like new_zeros zero_ fill_ full ones ones_like full_like new_full".split())
PRODUCTS = set("mm addmm addmm_ bmm baddbmm baddbmm_".split())
TRAFFIC = "memory traffic"
# Functions of Transformer Engine.
ATTENTION = ("fused_attn_fwd", "fused_attn_bwd")
ENGINE_PRODUCTS = {"generic_gemm": "products", "te_general_grouped_gemm": "grouped"}
ACCUMULATE, WORKSPACE = 14, 12  # positions of arguments in both products
ENGINE_FREE = {"bulk_allocate"}
# Packages whose modules may import these functions by name.
HOLDERS = ("transformer_engine", "transformer_engine_torch", "megatron")


class Roofline(TorchDispatchMode):
    """Add up the operations on a GPU by kind: products, grouped products, attention and memory traffic.

    Args:
        args: Megatron's, for the sizes of experts and heads.
        rates: from `step_time.rates`.
        engine: watches Transformer Engine's functions.

    Attributes:
        parts: kind → number of "operations", their "bytes", "flops" and "seconds".
    """

    def __init__(self, args: argparse.Namespace, rates: dict[str, float], engine: "EngineCalls") -> None:
        super().__init__()
        self._args, self._rates, self._engine = args, rates, engine
        self.parts: dict[str, dict[str, float]] = {}

    def __enter__(self) -> "Roofline":
        """Also count the calls that bypass PyTorch's dispatch, until the process ends."""
        from triton.compiler import CompiledKernel

        self._engine.report = self.add
        CompiledKernel.launch_metadata = self._watched(CompiledKernel.launch_metadata)
        return super().__enter__()

    def _watched(self, real: Any) -> Any:
        """Wrap the function that Triton calls with a kernel's arguments before each launch."""

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
        inputs = find_tensors(given)
        outputs = find_tensors(result) or inputs[:1]
        if any(tensor.is_cuda for tensor in (*inputs, *outputs)):
            flops, rate = _flops(name, inputs)
            share = grouped_share(self._args) if rate == "grouped" else 1.0
            self.add(_bytes(name, inputs, outputs), flops, rate, share)
        return result

    def add(self, moved: float, flops: float, rate: str, share: float = 1.0) -> None:
        """Add an operation that moves `moved` bytes and takes `flops` FLOPs at a `share` of the rate named `rate`."""
        seconds = max(moved / (self._rates["bandwidth"] * 1e12), self._rates["smallest"] * 1e-6)
        if rate == "attention":
            share = attention_share(self._args)
        if flops:
            seconds = max(seconds, flops / (share * self._rates[rate] * 1e12))
        work = {"operations": 1, "bytes": moved, "flops": flops, "seconds": seconds}
        before = self.parts.get(rate if flops else TRAFFIC, dict.fromkeys(work, 0))
        self.parts[rate if flops else TRAFFIC] = {name: before[name] + number for name, number in work.items()}


def _size(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes in memory; an expanded dimension counts once."""
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


class EngineCalls:
    """Watch Transformer Engine's C++ functions, which bypass PyTorch's dispatch.

    Attributes:
        report: called with each call's bytes, its FLOPs, and the rate that applies to the FLOPs.
    """

    def __init__(self) -> None:
        self.report: Callable[[float, float, str], None] | None = None

    def watch(self) -> None:
        """Start watching, if the engine is installed. Call this once Megatron is imported, before it builds a model."""
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            return
        import transformer_engine_torch as functions

        _replace_attention(functions)
        watched = {
            id(value): self._watched(name, value)
            for name, value in vars(functions).items()
            if callable(value) and not isinstance(value, type) and not name.startswith("_") and name not in ENGINE_FREE
        }
        for module in [sys.modules[name] for name in sys.modules if name.split(".")[0] in HOLDERS]:
            for name, value in list(vars(module).items()):
                if id(value) in watched:
                    setattr(module, name, watched[id(value)])

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if self.report is not None:
                tensors = call_tensors(name, arguments, options, result)
                if any(tensor.is_cuda and tensor.numel() for tensor in tensors):
                    self.report(*measure_work(name, arguments, tensors))
            return result

        return call


def _replace_attention(functions: Any) -> None:
    """Make Transformer Engine choose cuDNN's attention, and replace that, as cuDNN has no no-op version."""
    chosen = functions.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    functions.get_fused_attn_backend = lambda *_, **__: (chosen, "")
    functions.fused_attn_fwd, functions.fused_attn_bwd = _attend, _attend_backward


def call_tensors(name: str, arguments: Sequence[Any], options: dict[str, Any], result: Any) -> list[torch.Tensor]:
    """Return a call's tensors, each once, without a product's workspace."""
    given = [*arguments[:WORKSPACE], *arguments[WORKSPACE + 1 :]] if name in ENGINE_PRODUCTS else arguments
    tensors = find_tensors([given, options, result])
    return list({id(tensor): tensor for tensor in tensors}.values())


def measure_work(name: str, arguments: Sequence[Any], tensors: list[torch.Tensor]) -> tuple[float, float, str]:
    """Return the bytes that a call moves, its FLOPs, and the rate that applies to the FLOPs."""
    moved = float(sum(tensor.nbytes for tensor in tensors))
    if name in ATTENTION:
        # Causal attention over at most arguments[1] keys: half of the products.
        passes = 2.0 if name == ATTENTION[0] else 5.0
        return moved, passes * _heads(arguments)[0].numel() * arguments[1], "attention"
    if name in ENGINE_PRODUCTS:
        if arguments[ACCUMULATE]:
            moved += sum(tensor.nbytes for tensor in find_tensors(arguments[4]))
        flops = 0.0
        for left, right in zip(find_tensors(arguments[0]), find_tensors(arguments[2]), strict=True):
            common = left.shape[-1] if arguments[1] else left.numel() // left.shape[-1]
            flops += 2.0 * left.numel() * right.numel() / max(common, 1)
        return moved, flops, ENGINE_PRODUCTS[name]
    if name.startswith("multi_tensor_adam"):
        # All but the gradients are also written.
        moved += sum(tensor.nbytes for tensor in find_tensors(arguments[2][1:]))
    return moved, 0.0, ""


def _heads(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Return queries, keys, values, and in the backward pass output and gradient: `[sequence, batch, heads, size]`."""
    return [value for value in arguments if torch.is_tensor(value) and value.dim() >= 3]


def _attend(*arguments: Any, **_options: Any) -> list[torch.Tensor]:
    query, _, value = _heads(arguments)[:3]
    offsets = next(value for value in arguments if torch.is_tensor(value))  # start of each sequence, and the end
    ctypes.CDLL("libcuda.so.1").rehearsal_launched()
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    sums = query.new_empty((offsets.numel() - 1, query.shape[-2], arguments[0], 1), dtype=torch.float32)
    return [output, sums, query.new_empty(2, dtype=torch.int64)]


def _attend_backward(*arguments: Any, **_options: Any) -> list[torch.Tensor | None]:
    for _ in range(3):  # the kernels of sums, gradients and queries
        ctypes.CDLL("libcuda.so.1").rehearsal_launched()
    return [*map(torch.empty_like, _heads(arguments)[:3]), None, None]


def find_tensors(values: Any) -> list[torch.Tensor]:
    """Return the tensors in `values`, also in nested lists, tuples and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
