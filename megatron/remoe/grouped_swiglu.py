"""All experts of a layer at once: bias-free SwiGLU over stacked weights, forward and backward.

PyTorch's own kernels, in as few passes over memory as they allow. Only the experts' input and the product of the first
matrix are kept for the backward pass, and weight gradients go straight into Megatron's buffer where it has their type.
"""

from typing import Any

import torch
from torch.nn.functional import grouped_mm, silu

Gradients = tuple[torch.Tensor | None, ...]


def grouped_swiglu(
    rows: torch.Tensor,
    gates: torch.Tensor,
    fc1: torch.nn.Parameter,
    fc2: torch.nn.Parameter,
    tokens_per_expert: torch.Tensor,
    gives_gradient: bool = True,
) -> torch.Tensor:
    """`(gate · SiLU(x Wg) ⊙ x Wu) Wd` for rows that are sorted by expert.

    Args:
        rows: x, `[rows, hidden]`.
        gates: `[rows]`.
        fc1: `[experts, 2 * ffn, hidden]`, Wg and then Wu.
        fc2: `[experts, hidden, ffn]`, Wd.
        tokens_per_expert: int64 `[experts]`; on the host, unless the rows are half precision on a GPU.
        gives_gradient: whether the weights get a gradient without values where the true one is in Megatron's buffer, so
            that Megatron's hook sees one; of several calls in one forward pass one has to.

    Returns:
        `[rows, hidden]`.
    """
    if rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16):
        ends = tokens_per_expert.cumsum(0).to(device=rows.device, dtype=torch.int32, non_blocking=True)
        return _GroupedSwiGLU.apply(rows, gates, fc1, fc2, ends, gives_gradient)
    return _LoopedSwiGLU.apply(rows, gates, fc1, fc2, tokens_per_expert.tolist(), gives_gradient)


class _GroupedSwiGLU(torch.autograd.Function):
    """One kernel for all experts, which takes their sizes from the device."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        gates: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        ends: torch.Tensor,
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.gives_gradient = gives_gradient
        hidden = grouped_mm(rows, fc1.transpose(1, 2), offs=ends)
        ctx.save_for_backward(rows, gates, hidden, ends)
        ctx.weights = fc1, fc2  # saved, they would come back without Megatron's buffer from a checkpointed part
        return grouped_mm(_activate(hidden, gates), fc2.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        rows, gates, hidden, ends = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        gradient = gradient.contiguous()
        d_activated = grouped_mm(gradient, fc2, offs=ends)
        activated, d_hidden, d_gates = _activate_backward(hidden, gates, d_activated)
        d_fc2 = _into_main_grad(fc2, grouped_mm(gradient.T, activated, offs=ends), ctx.gives_gradient)
        d_fc1 = _into_main_grad(fc1, grouped_mm(d_hidden.T, rows, offs=ends), ctx.gives_gradient)
        return grouped_mm(d_hidden, fc1, offs=ends), d_gates, d_fc1, d_fc2, None, None


class _LoopedSwiGLU(torch.autograd.Function):
    """One expert after the other, so that what lies between two products is still in the cache: the fastest on CPUs."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        gates: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        sizes: list[int],
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.gives_gradient = gives_gradient
        hiddens, outputs = [], []
        for x, gate, first, second in zip(rows.split(sizes), gates.split(sizes), fc1, fc2, strict=True):
            hidden = torch.mm(x, first.T)
            hiddens.append(hidden)
            outputs.append(torch.mm(_activate(hidden, gate), second.T))
        ctx.save_for_backward(rows, gates, *hiddens)
        ctx.weights = fc1, fc2
        ctx.sizes = sizes
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        rows, gates, *hiddens = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        main_fc1, main_fc2 = _main_grad(fc1), _main_grad(fc2)
        d_fc1 = torch.empty_like(fc1) if main_fc1 is None else main_fc1
        d_fc2 = torch.empty_like(fc2) if main_fc2 is None else main_fc2
        d_rows, d_gates = [], []
        parts = (gradient.split(ctx.sizes), rows.split(ctx.sizes), gates.split(ctx.sizes), hiddens)
        for d_y, x, gate, hidden, first, second, d_first, d_second in zip(*parts, fc1, fc2, d_fc1, d_fc2, strict=True):
            activated, d_hidden, d_gate = _activate_backward(hidden, gate, torch.mm(d_y, second))
            _outer(d_second, d_y, activated, add=main_fc2 is not None)
            _outer(d_first, d_hidden, x, add=main_fc1 is not None)
            d_rows.append(torch.mm(d_hidden, first))
            d_gates.append(d_gate)
        given_fc1 = d_fc1 if main_fc1 is None else _gradient_is_in_main_grad(fc1, ctx.gives_gradient)
        given_fc2 = d_fc2 if main_fc2 is None else _gradient_is_in_main_grad(fc2, ctx.gives_gradient)
        return torch.cat(d_rows), torch.cat(d_gates), given_fc1, given_fc2, None, None


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


def _outer(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    if not add:
        torch.mm(left.T, right, out=out)
    elif len(left):
        out.addmm_(left.T, right)


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
