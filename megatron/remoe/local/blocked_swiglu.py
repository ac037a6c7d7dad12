"""The experts' SwiGLU with a product an expert, for every device, type and size.

On CPUs a few experts at a time: what lies between two products is still in the cache.
"""

from typing import Any

import torch

from megatron.remoe.local.swiglu import (
    Activation,
    Gradients,
    Order,
    add_outers,
    add_pairs,
    empty_sum,
    gradient_is_in_main_grad,
    main_grad_of,
    sum_pairs,
    take,
)

# What a block of experts works on should stay in the cache, and be enough for the passes between two products.
BLOCK_PAIRS = 256
FEW_PAIRS = 64


class BlockedSwiGLU(torch.autograd.Function):
    """`grouped_swiglu`, whose arguments these are, in blocks of experts."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        gates: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        sizes: list[int],
        order: Order,
        activation: Activation,
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.activation, ctx.gives_gradient = activation, gives_gradient
        ctx.blocks = _blocks(sizes, BLOCK_PAIRS if tokens.device.type == "cpu" else sum(sizes))
        token_index, by_token, _ = order
        added_to = token_index if by_token is None else None
        hiddens, output = [], empty_sum(tokens, added_to, len(gates))
        for experts, block, parts in ctx.blocks:
            hidden = _products(take(tokens, token_index, block), fc1[experts].transpose(1, 2), parts)
            hiddens.append(hidden)
            activated = activation.forward(hidden, gates[block])
            _add_products(output, added_to, block, activated, fc2[experts].transpose(1, 2), parts)
        ctx.save_for_backward(tokens, gates, token_index, by_token, *hiddens)
        ctx.weights = fc1, fc2
        return _summed(output, order, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        tokens, gates, token_index, by_token, *hiddens = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        main_fc1, main_fc2 = main_grad_of(fc1), main_grad_of(fc2)
        d_fc1 = torch.empty_like(fc1) if main_fc1 is None else main_fc1
        d_fc2 = torch.empty_like(fc2) if main_fc2 is None else main_fc2
        added_to = token_index if by_token is None else None
        d_tokens, d_gates = empty_sum(tokens, added_to, len(gates)), torch.empty_like(gates)
        for (experts, block, parts), hidden in zip(ctx.blocks, hiddens, strict=True):
            part_of_gradient = take(gradient, token_index, block)
            d_activated = _products(part_of_gradient, fc2[experts], parts)
            activated, d_hidden, d_gates[block] = ctx.activation.backward(hidden, gates[block], d_activated)
            _outers(d_fc2[experts], part_of_gradient, activated, parts, add=main_fc2 is not None)
            _outers(d_fc1[experts], d_hidden, take(tokens, token_index, block), parts, add=main_fc1 is not None)
            _add_products(d_tokens, added_to, block, d_hidden, fc1[experts], parts)
        given_fc1 = d_fc1 if main_fc1 is None else gradient_is_in_main_grad(fc1, ctx.gives_gradient)
        given_fc2 = d_fc2 if main_fc2 is None else gradient_is_in_main_grad(fc2, ctx.gives_gradient)
        d_tokens = _summed(d_tokens, Order(token_index, by_token), tokens)
        return d_tokens, d_gates, given_fc1, given_fc2, None, None, None, None


def _summed(output: torch.Tensor, order: Order, tokens: torch.Tensor) -> torch.Tensor:
    """What is in the place of `empty_sum`, as it leaves."""
    return output.to(tokens.dtype) if order.by_token is None else sum_pairs(output, order, len(tokens))


def _blocks(sizes: list[int], limit: int) -> list[tuple[slice, slice, list[int]]]:
    """Blocks of at most `limit` pairs or of one expert: its experts, pairs, and how many each has."""
    blocks = []
    expert = pair = 0
    while expert < len(sizes):
        end, pairs = expert + 1, sizes[expert]
        while end < len(sizes) and pairs + sizes[end] <= limit:
            pairs += sizes[end]
            end += 1
        blocks.append((slice(expert, end), slice(pair, pair + pairs), sizes[expert:end]))
        expert, pair = end, pair + pairs
    return blocks


def _add_products(
    sums: torch.Tensor,
    token_index: torch.Tensor | None,
    block: slice,
    left: torch.Tensor,
    weights: torch.Tensor,
    sizes: list[int],
) -> None:
    """`_products` of the block's pairs, put into their place in `sums` or added to those of their tokens."""
    if token_index is None:
        _products(left, weights, sizes, sums[block])
    else:
        add_pairs(sums, token_index[block], _products(left, weights, sizes))


def _products(
    rows: torch.Tensor, weights: torch.Tensor, sizes: list[int], out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each expert's rows times its matrix, into `out`: `[rows, in]`, `[experts, in, out]` → `[rows, out]`."""
    if out is None and len(sizes) == 1:
        return torch.mm(rows, weights[0])
    if out is None:
        out = rows.new_empty(len(rows), weights.shape[2])
    parts = zip(rows.split(sizes), weights, out.split(sizes), strict=True)
    if weights.stride(1) == 1 and max(sizes) <= FEW_PAIRS:
        # The larger factor goes to the left, where a kernel takes it as it lies in memory.
        for part, weight, place in parts:
            torch.mm(weight.T, part.T, out=place.T)
    else:
        for part, weight, place in parts:
            torch.mm(part, weight, out=place)
    return out


def _outers(outs: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sizes: list[int], add: bool) -> None:
    """Each expert's `left.T @ right` into its matrix of `outs`, or added to it."""
    if add:
        add_outers(outs, left, right, sizes)
        return
    for out, a, b in zip(outs, left.split(sizes), right.split(sizes), strict=True):
        torch.mm(a.T, b, out=out)
