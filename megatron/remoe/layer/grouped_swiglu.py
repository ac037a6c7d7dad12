"""Compute all experts of a layer: bias-free SwiGLU over stacked weights, forward and backward.

T tokens, P pairs (of a token and one of its experts), L experts on this rank, H hidden size, F the experts' FFN size.
"""

from functools import cache
from typing import Any

import torch
from torch.nn import functional

from megatron.remoe.kernels.interface import Backend, Order
from megatron.remoe.kernels.main_grad import add_outer, find_main_grad, mark_as_added

KERNEL_EXPERTS, KERNEL_MULTIPLE = 1023, 8  # maximum number of experts; a row of bf16 is a multiple of 16 bytes
SM90, SM100 = 9, 10


@cache
def _generation(device: torch.device) -> int:
    """Return the GPU's major compute capability; 0 for other devices."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def supports_grouped_kernel(fc1: torch.Tensor) -> bool:
    """Return whether `grouped_mm` is one kernel for weights `[L, 2 * F, H]`; otherwise it loops or raises an error."""
    experts, ffn, hidden = len(fc1), fc1.shape[1] // 2, fc1.shape[2]
    takes_sizes = not (hidden % KERNEL_MULTIPLE or ffn % KERNEL_MULTIPLE or experts > KERNEL_EXPERTS)
    return fc1.dtype == torch.bfloat16 and _generation(fc1.device) in (SM90, SM100) and takes_sizes


def grouped_swiglu(
    tokens_TH: torch.Tensor,
    gates_P: torch.Tensor,
    fc1: torch.nn.Parameter,
    fc2: torch.nn.Parameter,
    sizes: list[int],
    order: Order,
    backend: Backend,
) -> torch.Tensor:
    """Return each token's sum of `(gate · SiLU(x W_left) ⊙ x W_right) W_down` over its experts, `[T, H]`.

    Args:
        tokens_TH: x, `[T, H]`.
        gates_P: `[P]`, sorted by expert.
        fc1: `[L, 2 * F, H]`, W_left and then W_right.
        fc2: `[L, H, F]`, W_down.
        sizes: the number of pairs of each expert.
        order: maps tokens to pairs and back.
        backend: computes SwiGLU between the products.
    """
    uses_one_kernel = len(gates_P) > 0 and supports_grouped_kernel(fc1)  # without rows grouped_mm may fail or hang
    products = OneKernel(sizes, tokens_TH.device) if uses_one_kernel else OneByOne(sizes)
    return _GroupedSwiGLU.apply(tokens_TH, gates_P, products, order, backend, fc1, fc2)


class OneByOne:
    """Compute a separate product for each expert; works for every device, type and size."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes  # pairs of each expert

    def multiply(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Multiply each expert's rows by its matrix: `[P, in]`, `[L, in, out]` → `[P, out]`."""
        out = rows.new_empty(len(rows), weights.shape[2])
        for part, weight, place in zip(rows.split(self.sizes), weights, out.split(self.sizes), strict=True):
            torch.mm(part, weight, out=place)
        return out

    def outers(self, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return each expert's weight gradient `gradient.T @ rows`: `[P, out]`, `[P, in]` → `[L, out, in]`."""
        outs = gradient.new_empty(len(self.sizes), gradient.shape[1], rows.shape[1])
        for out, d_part, part in zip(outs, gradient.split(self.sizes), rows.split(self.sizes), strict=True):
            torch.mm(d_part.T, part, out=out)
        return outs

    def add_outers(self, outs: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the results of `outers` to `outs`, in the dtype of `outs`."""
        for out, d_part, part in zip(outs, gradient.split(self.sizes), rows.split(self.sizes), strict=True):
            if len(part):
                add_outer(part, d_part, out)


class OneKernel:
    """Compute the products of all experts with one `grouped_mm`, which reads their sizes on the device."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self.ends = torch.tensor(sizes).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)

    def multiply(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Multiply as `OneByOne.multiply` does."""
        return functional.grouped_mm(rows, weights, offs=self.ends)

    def outers(self, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Multiply as `OneByOne.outers` does."""
        outers = functional.grouped_mm(gradient.T, rows, offs=self.ends)
        if _generation(self.ends.device) == SM100:
            # The kernel does not write zeros for experts without pairs: pytorch/pytorch#172439.
            outers.masked_fill_((self.ends.diff(prepend=self.ends.new_zeros(1)) == 0)[:, None, None], 0.0)
        return outers

    def add_outers(self, outs: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor) -> None:
        """Add as `OneByOne.add_outers` does."""
        outs.add_(self.outers(gradient, rows))


class _GroupedSwiGLU(torch.autograd.Function):
    """Save only the tokens and the first product; add weight gradients to Megatron's buffer if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens_TH: torch.Tensor,
        gates_P: torch.Tensor,
        products: OneByOne | OneKernel,
        order: Order,
        backend: Backend,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
    ) -> torch.Tensor:
        ctx.products, ctx.order_type, ctx.backend = products, type(order), backend
        ctx.weights = fc1, fc2  # save_for_backward would lose their main_grad under a checkpoint
        hidden = products.multiply(order.take(tokens_TH), fc1.transpose(1, 2))
        ctx.save_for_backward(tokens_TH, gates_P, hidden, *order)
        pairs_PH = products.multiply(backend.activate(hidden, gates_P), fc2.transpose(1, 2))
        return order.sum(pairs_PH, len(tokens_TH))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens_TH, gates_P, hidden, *order_tensors = ctx.saved_tensors
        products, order, (fc1, fc2) = ctx.products, ctx.order_type(*order_tensors), ctx.weights
        gradient_PH = order.take(gradient).contiguous()
        d_activated = products.multiply(gradient_PH, fc2)
        activated, d_hidden, d_gates = ctx.backend.activate_backward(hidden, gates_P, d_activated)
        d_fc2 = _weight_gradient(fc2, products, gradient_PH, activated)
        d_fc1 = _weight_gradient(fc1, products, d_hidden, order.take(tokens_TH))
        d_tokens = order.sum(products.multiply(d_hidden, fc1), len(tokens_TH))
        return d_tokens, d_gates, None, None, None, d_fc1, d_fc2


def _weight_gradient(
    weight: torch.Tensor, products: OneByOne | OneKernel, gradient: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Return each expert's `gradient.T @ rows`, or an empty tensor if it was added to Megatron's buffer."""
    main_grad = find_main_grad(weight)
    if main_grad is None:
        return products.outers(gradient, rows)
    products.add_outers(main_grad, gradient, rows)
    return mark_as_added(weight)
