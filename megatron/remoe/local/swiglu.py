"""What the experts' kernels share: tokens to pairs and back, SwiGLU with gates, and Megatron's gradient buffer.

`token_index` is the token of each pair, int `[pairs]`, in the order of the experts; None where the tokens are the
pairs, in that order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import silu

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.kernels import wants_kernels

Gradients = tuple[torch.Tensor | None, ...]


class Order(NamedTuple):
    """Which pairs there are, of tokens in their own order; or of pairs that are in that of the experts already.

    Attributes:
        token_index: see above.
        by_token: int32 `[num_tokens + 1 + pairs]`, the pairs of each token, as `kernels.plan.fill` gives them; None
            without Triton.
        ends: int32 `[experts]`, likewise.
    """

    token_index: torch.Tensor | None = None
    by_token: torch.Tensor | None = None
    ends: torch.Tensor | None = None


BY_EXPERT = Order()


def take(tokens: torch.Tensor, token_index: torch.Tensor | None, block: slice = slice(None)) -> torch.Tensor:
    """The tokens of the block's pairs: `[num_tokens, hidden]` → `[pairs, hidden]`."""
    return tokens[block] if token_index is None else tokens.index_select(0, token_index[block])


def sum_pairs(pairs: torch.Tensor, order: Order, num_tokens: int) -> torch.Tensor:
    """Each token's sum, added up in fp32 at least: `[pairs, hidden]` → `[num_tokens, hidden]`."""
    if order.by_token is not None:
        from megatron.remoe.kernels.rows import sum_rows

        return sum_rows(pairs, order.by_token)
    if order.token_index is None:
        return pairs
    dtype = torch.promote_types(pairs.dtype, torch.float32)
    sums = pairs.new_zeros(num_tokens, pairs.shape[1], dtype=dtype)
    return add_pairs(sums, order.token_index, pairs).to(pairs.dtype)


def empty_sum(tokens: torch.Tensor, token_index: torch.Tensor | None, num_pairs: int) -> torch.Tensor:
    """Where sums go, `[num_tokens, hidden]`: zeros in fp32 or more; or where pairs go, unset, with no `token_index`."""
    if token_index is None:
        return tokens.new_empty(num_pairs, tokens.shape[1])
    return torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))


def add_pairs(sums: torch.Tensor, token_index: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Adds `[pairs, hidden]` to the sums of their tokens, `[num_tokens, hidden]`, which it returns."""
    if pairs.dtype == sums.dtype:
        return sums.index_add_(0, token_index, pairs)
    # A part of them at a time: all at once, cast, would be twice as large as the pairs.
    rows = max(len(sums), 1)
    for index, part in zip(token_index.split(rows), pairs.split(rows), strict=True):
        sums.index_add_(0, index, part.to(sums.dtype))
    return sums


def activate(hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`[pairs, 2 * ffn]`, `[pairs]` → `[pairs, ffn]`."""
    gate, up = hidden.chunk(2, dim=-1)
    return silu(gate).mul_(up).mul_(gates.unsqueeze(-1))


def activate_backward(
    hidden: torch.Tensor, gates: torch.Tensor, d_activated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result of `activate` again, and the gradients of its inputs; uses up `d_activated`."""
    gate, up = hidden.chunk(2, dim=-1)
    activation = silu(gate)
    activated = activation * up
    d_gates = (d_activated * activated).sum(dim=-1, dtype=gates.dtype)
    activated.mul_(gates.unsqueeze(-1))
    d_activated.mul_(gates.unsqueeze(-1))
    d_hidden = torch.empty_like(hidden)
    d_gate, d_up = d_hidden.chunk(2, dim=-1)
    torch.mul(d_activated, activation, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_activated.mul_(up), gate, grad_input=d_gate)
    return activated, d_hidden, d_gates


class Activation(NamedTuple):
    """`activate` and `activate_backward`, or what stands for them."""

    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = activate
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = (
        activate_backward
    )

    @classmethod
    def of(cls, config: TransformerConfig) -> "Activation":
        """Those that `--moe-kernels` asks for."""
        if not wants_kernels(config):
            return PLAIN
        from megatron.remoe.kernels import swiglu

        return cls(swiglu.activate, swiglu.activate_backward)


PLAIN = Activation()


def main_grad_of(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """Megatron's gradient buffer of `weight`, where `add_outers` can add to it."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # Products of half precision are added to fp32 by cuBLAS alone.
    is_wider = weight.is_cuda and weight.itemsize == 2 and main_grad.dtype == torch.float32
    return main_grad if main_grad.dtype == weight.dtype or is_wider else None


def add_outers(outs: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sizes: list[int]) -> None:
    """Add each expert's `left.T @ right` to its matrix: `[pairs, out]`, `[pairs, in]` → `[experts, out, in]`."""
    for out, a, b in zip(outs, left.split(sizes), right.split(sizes), strict=True):
        if len(a):
            add_outer(out, a, b)


def add_outer(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add `left.T @ right` to `out`, in its type: `[rows, out]`, `[rows, in]` → `[out, in]`."""
    if out.dtype == left.dtype:
        out.addmm_(left.T, right)
    else:
        torch.addmm(out, left.T, right, out_dtype=out.dtype, out=out)


def gradient_is_in_main_grad(weight: torch.nn.Parameter, gives_gradient: bool) -> torch.Tensor | None:
    """Tells Megatron's hook so, which must run, in this thread: hence a gradient whose values are never looked at."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight) if gives_gradient else None


def into_main_grad(weight: torch.nn.Parameter, gradient: torch.Tensor, gives_gradient: bool) -> torch.Tensor | None:
    """Adds a gradient to Megatron's buffer where that fits, and gives what autograd is to have of it."""
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return gradient
    main_grad.add_(gradient)
    return gradient_is_in_main_grad(weight, gives_gradient)
