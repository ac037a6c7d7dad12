"""Compute `grouped_swiglu` with products that also gather their rows and apply SwiGLU.

T tokens, P pairs, E experts, H hidden size, F the experts' FFN size.
"""

from typing import Any

import torch

from megatron.remoe.kernels.backend import Order, Products
from megatron.remoe.kernels.main_grad import main_grad_of, mark_as_added


class FusedSwiGLU(torch.autograd.Function):
    """Save only the tokens and the first product; add weight gradients to Megatron's buffer if there is one."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens_TH: torch.Tensor,
        gates_P: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        starts: torch.Tensor,
        order: Order,
        products: Products,
    ) -> torch.Tensor:
        """Compute `grouped_swiglu`; `starts` are int32 `[E + 1]`, the bounds of each expert's pairs on the device."""
        ctx.products, ctx.order_type, ctx.gates_dtype = products, type(order), gates_P.dtype
        ctx.weights = fc1, fc2  # save_for_backward would lose their main_grad under a checkpoint
        tokens_TH, gates_P = tokens_TH.contiguous(), gates_P.float()
        hidden, activated = products.up(tokens_TH, _index_of(order), gates_P, fc1, starts)
        ctx.save_for_backward(tokens_TH, gates_P, hidden, starts, *order)
        return order.sum(products.down(activated, fc2, starts), len(tokens_TH))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens_TH, gates_P, hidden, starts, *of_order = ctx.saved_tensors
        products, order, (fc1, fc2) = ctx.products, ctx.order_type(*of_order), ctx.weights
        gradient, index = gradient.contiguous(), _index_of(order)
        d_hidden, activated, d_gates = products.down_backward(gradient, index, gates_P, fc2, hidden, starts)
        d_fc2 = _weight_gradient(products, fc2, gradient, index, activated, starts, is_first=False)
        d_fc1 = _weight_gradient(products, fc1, tokens_TH, index, d_hidden, starts, is_first=True)
        d_tokens = order.sum(products.up_backward(d_hidden, fc1, starts), len(tokens_TH))
        return d_tokens, d_gates.to(ctx.gates_dtype), d_fc1, d_fc2, None, None, None


def _index_of(order: Order) -> torch.Tensor | None:
    """Return the token of each pair; None if the rows are sorted by expert already."""
    return getattr(order, "token_index_P", None)


def _weight_gradient(
    products: Products,
    weight: torch.nn.Parameter,
    tokens: torch.Tensor,
    index: torch.Tensor | None,
    rows: torch.Tensor,
    starts: torch.Tensor,
    is_first: bool,
) -> torch.Tensor:
    """Return the gradient of fc1 if `is_first`, else of fc2; an empty tensor if it was added to Megatron's buffer."""
    main_grad = main_grad_of(weight)
    out = torch.empty_like(weight) if main_grad is None else main_grad
    of_hidden = out.transpose(1, 2) if is_first else out  # [E, H, columns of rows]
    products.outers(tokens, index, rows, of_hidden, starts, alternate=is_first, adds=main_grad is not None)
    return out if main_grad is None else mark_as_added(weight)
