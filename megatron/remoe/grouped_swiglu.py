"""All experts of a layer at once: bias-free SwiGLU over stacked weights, forward and backward.

PyTorch's own kernels, in as few passes over memory as they allow. Only the tokens and the product of the first matrix
are kept for the backward pass, and weight gradients go straight into Megatron's buffer where it has their type.
"""

from typing import Any

import torch
from torch.nn.functional import grouped_mm, silu

# What a block of experts works on should stay in the cache, and be enough for the passes between two products.
BLOCK_ROWS = 256
FEW_ROWS = 64

Gradients = tuple[torch.Tensor | None, ...]


def grouped_swiglu(
    tokens: torch.Tensor,
    gates: torch.Tensor,
    fc1: torch.nn.Parameter,
    fc2: torch.nn.Parameter,
    tokens_per_expert: torch.Tensor,
    rows: torch.Tensor | None = None,
    gives_gradient: bool = True,
) -> torch.Tensor:
    """Each token's sum of `(gate · SiLU(x Wg) ⊙ x Wu) Wd` over its experts.

    Args:
        tokens: x, `[num_tokens, hidden]`.
        gates: `[pairs]`, sorted by expert.
        fc1: `[experts, 2 * ffn, hidden]`, Wg and then Wu.
        fc2: `[experts, hidden, ffn]`, Wd.
        tokens_per_expert: int64 `[experts]`; on the host, unless the tokens are half precision on a GPU.
        rows: int64 `[pairs]`, the token of each pair; None where the tokens themselves are the pairs, in their order.
        gives_gradient: whether the weights get a gradient without values where the true one is in Megatron's buffer, so
            that Megatron's hook sees one; of several calls in one forward pass one has to.

    Returns:
        `[num_tokens, hidden]`.
    """
    if tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16):
        ends = tokens_per_expert.cumsum(0).to(device=tokens.device, dtype=torch.int32, non_blocking=True)
        return _GroupedSwiGLU.apply(tokens, gates, fc1, fc2, ends, rows, gives_gradient)
    return _LoopedSwiGLU.apply(tokens, gates, fc1, fc2, tokens_per_expert.tolist(), rows, gives_gradient)


class _GroupedSwiGLU(torch.autograd.Function):
    """One kernel for all experts, which takes their sizes from the device."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        gates: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        ends: torch.Tensor,
        rows: torch.Tensor | None,
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.gives_gradient = gives_gradient
        hidden = grouped_mm(_take(tokens, rows), fc1.transpose(1, 2), offs=ends)
        ctx.save_for_backward(tokens, gates, hidden, ends, rows)
        ctx.weights = fc1, fc2  # saved, they would come back without Megatron's buffer from a checkpointed part
        return _sum(grouped_mm(_activate(hidden, gates), fc2.transpose(1, 2), offs=ends), rows, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        tokens, gates, hidden, ends, rows = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        gradient = _take(gradient, rows).contiguous()
        d_activated = grouped_mm(gradient, fc2, offs=ends)
        activated, d_hidden, d_gates = _activate_backward(hidden, gates, d_activated)
        d_fc2 = _into_main_grad(fc2, grouped_mm(gradient.T, activated, offs=ends), ctx.gives_gradient)
        d_fc1 = _into_main_grad(fc1, grouped_mm(d_hidden.T, _take(tokens, rows), offs=ends), ctx.gives_gradient)
        return _sum(grouped_mm(d_hidden, fc1, offs=ends), rows, tokens), d_gates, d_fc1, d_fc2, None, None, None


class _LoopedSwiGLU(torch.autograd.Function):
    """A few experts at a time, so that what lies between two products is still in the cache: the fastest on CPUs."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        gates: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        sizes: list[int],
        rows: torch.Tensor | None,
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.gives_gradient = gives_gradient
        ctx.blocks = _blocks(sizes)
        hiddens, output = [], _empty_sum(tokens, rows)
        for experts, block, parts in ctx.blocks:
            hidden = _products(_take(tokens, rows, block), fc1[experts].transpose(1, 2), parts)
            hiddens.append(hidden)
            activated = _activate(hidden, gates[block])
            _add_products(output, rows, block, activated, fc2[experts].transpose(1, 2), parts)
        ctx.save_for_backward(tokens, gates, rows, *hiddens)
        ctx.weights = fc1, fc2
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        tokens, gates, rows, *hiddens = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        main_fc1, main_fc2 = _main_grad(fc1), _main_grad(fc2)
        d_fc1 = torch.empty_like(fc1) if main_fc1 is None else main_fc1
        d_fc2 = torch.empty_like(fc2) if main_fc2 is None else main_fc2
        d_tokens, d_gates = _empty_sum(tokens, rows), torch.empty_like(gates)
        for (experts, block, parts), hidden in zip(ctx.blocks, hiddens, strict=True):
            part_of_gradient = _take(gradient, rows, block)
            d_activated = _products(part_of_gradient, fc2[experts], parts)
            activated, d_hidden, d_gates[block] = _activate_backward(hidden, gates[block], d_activated)
            _outers(d_fc2[experts], part_of_gradient, activated, parts, add=main_fc2 is not None)
            _outers(d_fc1[experts], d_hidden, _take(tokens, rows, block), parts, add=main_fc1 is not None)
            _add_products(d_tokens, rows, block, d_hidden, fc1[experts], parts)
        given_fc1 = d_fc1 if main_fc1 is None else _gradient_is_in_main_grad(fc1, ctx.gives_gradient)
        given_fc2 = d_fc2 if main_fc2 is None else _gradient_is_in_main_grad(fc2, ctx.gives_gradient)
        return d_tokens, d_gates, given_fc1, given_fc2, None, None, None


def _blocks(sizes: list[int]) -> list[tuple[slice, slice, list[int]]]:
    """Cut the experts into blocks of about `BLOCK_ROWS` rows, at least of one expert: experts, rows, their numbers."""
    blocks = []
    expert = row = 0
    while expert < len(sizes):
        end, rows = expert + 1, sizes[expert]
        while end < len(sizes) and rows + sizes[end] <= BLOCK_ROWS:
            rows += sizes[end]
            end += 1
        blocks.append((slice(expert, end), slice(row, row + rows), sizes[expert:end]))
        expert, row = end, row + rows
    return blocks


def _take(tokens: torch.Tensor, rows: torch.Tensor | None, block: slice = slice(None)) -> torch.Tensor:
    """The tokens of the block's pairs: `[num_tokens, hidden]` → `[pairs, hidden]`."""
    return tokens[block] if rows is None else tokens.index_select(0, rows[block])


def _sum(pairs: torch.Tensor, rows: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Each token's sum over its pairs: `[pairs, hidden]` → the shape of `tokens`."""
    return pairs if rows is None else _empty_sum(tokens, rows).index_add_(0, rows, pairs)


def _empty_sum(tokens: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Where `_add_products` puts sums, `[num_tokens, hidden]`: zeros, or unset where each token is one pair."""
    return torch.empty_like(tokens) if rows is None else torch.zeros_like(tokens)


def _add_products(
    sums: torch.Tensor,
    rows: torch.Tensor | None,
    block: slice,
    left: torch.Tensor,
    weights: torch.Tensor,
    sizes: list[int],
) -> None:
    """`_products` of the block's pairs, put into their place in `sums` or added to those of their tokens."""
    if rows is None:
        _products(left, weights, sizes, sums[block])
    else:
        sums.index_add_(0, rows[block], _products(left, weights, sizes))


def _products(
    rows: torch.Tensor, weights: torch.Tensor, sizes: list[int], out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each expert's rows times its matrix, into `out`: `[rows, in]`, `[experts, in, out]` → `[rows, out]`."""
    if out is None and len(sizes) == 1:
        return torch.mm(rows, weights[0])
    if out is None:
        out = rows.new_empty(len(rows), weights.shape[2])
    parts = zip(rows.split(sizes), weights, out.split(sizes), strict=True)
    if weights.stride(1) == 1 and max(sizes) <= FEW_ROWS:
        # The larger factor goes to the left, where a kernel takes it as it lies in memory.
        for part, weight, place in parts:
            torch.mm(weight.T, part.T, out=place.T)
    else:
        for part, weight, place in parts:
            torch.mm(part, weight, out=place)
    return out


def _outers(outs: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sizes: list[int], add: bool) -> None:
    """Each expert's `left.T @ right` into its matrix of `outs`, or added to it."""
    for out, a, b in zip(outs, left.split(sizes), right.split(sizes), strict=True):
        if not add:
            torch.mm(a.T, b, out=out)
        elif len(a):
            out.addmm_(a.T, b)


def _activate(hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`[rows, 2 * ffn]`, `[rows]` → `[rows, ffn]`."""
    gate, up = hidden.chunk(2, dim=-1)
    return silu(gate).mul_(up).mul_(gates.unsqueeze(-1))


def _activate_backward(
    hidden: torch.Tensor, gates: torch.Tensor, d_activated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result of `_activate` again, and the gradients of its inputs; uses up `d_activated`."""
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


def _main_grad(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """Megatron's gradient buffer of `weight`, where the gradient can be added to it as it is."""
    main_grad = getattr(weight, "main_grad", None)
    fits = main_grad is not None and main_grad.dtype == weight.dtype and hasattr(weight, "grad_added_to_main_grad")
    return main_grad if fits else None


def _gradient_is_in_main_grad(weight: torch.nn.Parameter, gives_gradient: bool) -> torch.Tensor | None:
    """Tells Megatron's hook so, which must run, in this thread: hence a gradient whose values are never looked at."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight) if gives_gradient else None


def _into_main_grad(weight: torch.nn.Parameter, gradient: torch.Tensor, gives_gradient: bool) -> torch.Tensor | None:
    main_grad = _main_grad(weight)
    if main_grad is None:
        return gradient
    main_grad.add_(gradient)
    return _gradient_is_in_main_grad(weight, gives_gradient)
