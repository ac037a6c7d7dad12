"""Run Transformer Engine over a no-op CUDA: simulate cuDNN's attention, and report each call's work."""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

type Tell = Callable[[float, float, str], None]

ATTENTION = ("fused_attn_fwd", "fused_attn_bwd")
PRODUCTS = {"generic_gemm": "products", "te_general_grouped_gemm": "grouped"}
ACCUMULATE, WORKSPACE = 14, 12  # arguments of both products
FREE = {"bulk_allocate"}
HOLDERS = ("transformer_engine", "transformer_engine_torch", "megatron")  # modules that may have imported them by name


class Calls:
    """Watches Transformer Engine's C++ functions, which bypass PyTorch's dispatch.

    Attributes:
        tell: called with each call's bytes, FLOPs and the rate of these.
    """

    def __init__(self) -> None:
        self.tell: Tell | None = None

    def watch(self) -> None:
        """Start watching, if the engine is installed. Call it once Megatron is imported, before it builds a model."""
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            return
        import transformer_engine_torch as functions

        _play_attention(functions)
        watched = {
            id(value): self._watched(name, value)
            for name, value in vars(functions).items()
            if callable(value) and not isinstance(value, type) and not name.startswith("_") and name not in FREE
        }
        for module in [sys.modules[name] for name in sys.modules if name.split(".")[0] in HOLDERS]:
            for name, value in list(vars(module).items()):
                if id(value) in watched:
                    setattr(module, name, watched[id(value)])

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if self.tell is not None:
                tensors = call_tensors(name, arguments, options, result)
                if any(one.is_cuda and one.numel() for one in tensors):
                    self.tell(*measure_work(name, arguments, tensors))
            return result

        return call


def _play_attention(functions: Any) -> None:
    """Route every attention to cuDNN's functions, and replace these, which cannot be simulated below Python."""
    chosen = functions.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    functions.get_fused_attn_backend = lambda *_, **__: (chosen, "")
    functions.fused_attn_fwd, functions.fused_attn_bwd = _attend, _attend_backward


def call_tensors(name: str, arguments: Sequence[Any], options: dict[str, Any], result: Any) -> list[torch.Tensor]:
    """Return a call's tensors, each once, without a product's workspace."""
    given = [*arguments[:WORKSPACE], *arguments[WORKSPACE + 1 :]] if name in PRODUCTS else arguments
    return list({id(one): one for one in iterate_tensors([given, list(options.values()), result])}.values())


def measure_work(name: str, arguments: Sequence[Any], tensors: list[torch.Tensor]) -> tuple[float, float, str]:
    """Return the bytes that a call moves, its FLOPs, and the rate that applies to these."""
    moved = float(sum(one.nbytes for one in tensors))
    if name in ATTENTION:
        # Causal attention over at most arguments[1] keys: half of the products.
        passes = 2.0 if name == ATTENTION[0] else 5.0
        return moved, passes * _heads(arguments)[0].numel() * arguments[1], "attention"
    if name in PRODUCTS:
        if arguments[ACCUMULATE]:
            moved += sum(one.nbytes for one in iterate_tensors([arguments[4]]))
        flops = 0.0
        for left, right in zip(iterate_tensors([arguments[0]]), iterate_tensors([arguments[2]]), strict=True):
            common = left.shape[-1] if arguments[1] else left.numel() // left.shape[-1]
            flops += 2.0 * left.numel() * right.numel() / max(common, 1)
        return moved, flops, PRODUCTS[name]
    if name.startswith("multi_tensor_adam"):
        moved += sum(one.nbytes for one in iterate_tensors(arguments[2][1:]))  # also written, except for the gradients
    return moved, 0.0, ""


def _heads(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Return queries, keys, values, and in the backward pass output and gradient: `[sequence, batch, heads, size]`."""
    return [one for one in arguments if torch.is_tensor(one) and one.dim() >= 3]


def _attend(*arguments: Any, **_options: Any) -> list[torch.Tensor]:
    query, _, value = _heads(arguments)[:3]
    sequences = next(one for one in arguments if torch.is_tensor(one)).numel() - 1  # where they begin, and the end
    _launch()
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    sums = query.new_empty((sequences, query.shape[-2], arguments[0], 1), dtype=torch.float32)
    return [output, sums, query.new_empty(2, dtype=torch.int64)]


def _attend_backward(*arguments: Any, **_options: Any) -> list[torch.Tensor | None]:
    for _ in range(3):  # kernels: for sums, gradients and queries
        _launch()
    return [*map(torch.empty_like, _heads(arguments)[:3]), None, None]


def _launch() -> None:
    ctypes.CDLL("libcuda.so.1").rehearsal_launched()


def iterate_tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among values, and in lists of them."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from iterate_tensors(value)
