"""Count the operations of a step by part, with the bytes and FLOPs of each; their times are those of step_time.py."""

import argparse
import importlib.util
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

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
# Part of a step by the module of a Triton kernel; other kernels go by shapes, as PyTorch's operations do.
TRITON_PARTS = {
    "router": "small: router, plan, update",
    "plan": "small: router, plan, update",
    "rows": "tokens: norms, residuals, gather, sum",
    "swiglu": "experts: SwiGLU and gates",
    "rotary": "attention: rope and copies",
}
# Kernels of flash-linear-attention and ours that pass over each argument once.
ONE_PASS = {f"cross_entropy_{name}" for name in ("fwd_kernel", "fwd_kernel_reduce", "bwd_kernel")}
ONE_PASS |= {"_gates", "_gradient", "_count", "_sum", "_rotate"}


@dataclass
class Work:
    """Operations, bytes, FLOPs and seconds of a part of a step."""

    operations: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


class Roofline(TorchDispatchMode):
    """Adds up the operations on a GPU by part of a step.

    Args:
        args: Megatron's, for the sizes that tell the parts apart.
        rates: see `gpus.rates`.
        engine: Transformer Engine's functions.
    """

    def __init__(self, args: argparse.Namespace, rates: dict[str, float], engine: Calls) -> None:
        super().__init__()
        self._args, self._rates, self._engine = args, rates, engine
        self._patches = ExitStack()
        self.parts: dict[str, Work] = {}
        self.guessed: set[str] = set()  # Triton kernels known by their arguments only

    def __enter__(self) -> "Roofline":
        self._patch(self._engine, "tell", self._add_engine)
        if importlib.util.find_spec("triton") is not None:
            from triton.compiler import CompiledKernel

            self._patch(CompiledKernel, "launch_metadata", self._watched(CompiledKernel.launch_metadata))
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patches.close()

    def _patch(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self._patches.enter_context(patch.object(owner, name, function))

    def _watched(self, real: Any) -> Any:
        """Wrap the function that Triton calls before each launch, with the kernel's arguments."""

        def launch_metadata(kernel: Any, grid: Any, stream: Any, *values: Any) -> Any:
            arguments = dict(zip(kernel.src.fn.arg_names, values, strict=True))
            describe = kernel.src.fn.launch_metadata
            self._add_triton(kernel, describe(grid, kernel.metadata, arguments) if describe else {}, arguments)
            return real(kernel, grid, stream, *values)

        return launch_metadata

    def _add_triton(self, kernel: Any, given: dict[str, Any], arguments: dict[str, Any]) -> None:
        name, tensors = kernel.src.fn.__name__, [value for value in arguments.values() if torch.is_tensor(value)]
        if "bytes" not in given and name not in ONE_PASS:
            self.guessed.add(name)
        module = kernel.src.fn.__module__.rpartition(".")[2]
        part = TRITON_PARTS.get(module) or self._part(name, False, tensors)
        self._add(part, given.get("bytes", sum(map(_size, tensors))), given.get("flops", 0.0), "products")

    def _add_engine(self, name: str, tensors: list[torch.Tensor], moved: float, flops: float, rate: str) -> None:
        self._add(self._part(rate if flops else name, bool(flops), tensors), moved, flops, rate)

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
            part = self._part(rate if flops else name, bool(flops), inputs + outputs)
            share = grouped_share(self._args) if rate == "grouped" else 1.0
            self._add(part, _bytes(name, inputs, outputs), flops, rate, share)
        return result

    def _add(self, part: str, moved: float, flops: float, rate: str, share: float = 1.0) -> None:
        seconds = max(moved / (self._rates["bandwidth"] * 1e12), self._rates["smallest"] * 1e-6)
        if rate == "attention":
            share = attention_share(self._args)
        if flops:
            seconds = max(seconds, flops / (share * self._rates[rate] * 1e12))
        work = self.parts.setdefault(part, Work())
        work.operations += 1
        work.bytes += moved
        work.flops += flops
        work.seconds += seconds

    def _part(self, name: str, is_product: bool, tensors: list[torch.Tensor]) -> str:
        args, shapes = self._args, [tuple(tensor.shape) for tensor in tensors if tensor.dim()]
        vocabulary = args.padded_vocab_size // args.tensor_model_parallel_size
        if any(vocabulary in shape[-2:] for shape in shapes):
            return "output layer" if is_product else "cross-entropy and embedding"
        if is_product:
            return {"grouped": "experts' products", "attention": "attention", "products": "products"}[name]
        if args.num_experts:
            experts = args.num_experts // args.expert_model_parallel_size
            if any(len(shape) == 3 and shape[0] == experts for shape in shapes):
                return "experts' weight gradients"
            if any(len(s) == 2 and s[-1] in (args.moe_ffn_hidden_size, 2 * args.moe_ffn_hidden_size) for s in shapes):
                return "experts: SwiGLU and gates"
        if any(len(shape) == 4 for shape in shapes):
            return "attention: rope and copies"
        small = 2 * args.seq_length * args.micro_batch_size * (args.num_experts or 1)
        if all(math.prod(shape) <= small for shape in shapes):
            return "small: router, plan, update"
        if name.startswith(("_foreach", "multi_tensor")) or any(len(shape) == 1 and shape[0] > 1e6 for shape in shapes):
            return "optimizer, norm and buffers of gradients"
        return "tokens: norms, residuals, gather, sum"


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
