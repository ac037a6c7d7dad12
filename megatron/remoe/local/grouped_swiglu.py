"""All experts of a layer at once: bias-free SwiGLU over stacked weights, forward and backward.

PyTorch's own kernels, in as few passes over memory as they allow. Only the tokens and the product of the first matrix
are kept for the backward pass, and weight gradients go straight into Megatron's buffer where it has their type.
"""

from functools import cache
from typing import Any

import torch
from torch.nn import functional

from megatron.remoe.local.blocked_swiglu import BlockedSwiGLU
from megatron.remoe.local.swiglu import (
    BY_EXPERT,
    PLAIN,
    Activation,
    Gradients,
    Order,
    add_outers,
    gradient_is_in_main_grad,
    into_main_grad,
    main_grad_of,
    sum_pairs,
    take,
)

KERNEL_EXPERTS, KERNEL_MULTIPLE = 1023, 8  # the most experts, and what rows of bf16 have to be a multiple of: 16 bytes
SM90, SM100 = 9, 10
# Elements of an expert's matrix from which its gradient is a product of its own, added in Megatron's buffer: that saves
# 4 bytes an element, which here take as long as a launch.
LARGE_MATRIX = 2**21


@cache
def _generation(device: torch.device) -> int:
    """The GPU's major compute capability; 0 of what is none."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether `grouped_mm` is one kernel there; elsewhere it loops over the experts, and waits for their sizes."""
    return _generation(device) in (SM90, SM100) and hasattr(functional, "grouped_mm")


def sizes_refused(fc1: torch.Tensor) -> list[str]:
    """What of the shape `[experts, 2 * ffn, hidden]` that kernel does not take."""
    experts, ffn, hidden = fc1.shape[0], fc1.shape[1] // 2, fc1.shape[2]
    multiple = f"is not a multiple of {KERNEL_MULTIPLE}"
    checks = {
        f"hidden size {hidden} {multiple}": hidden % KERNEL_MULTIPLE,
        f"expert FFN size {ffn} on a rank {multiple}": ffn % KERNEL_MULTIPLE,
        f"{experts} experts on a rank are more than {KERNEL_EXPERTS}": experts > KERNEL_EXPERTS,
    }
    return [text for text, is_refused in checks.items() if is_refused]


def takes_grouped_kernel(fc1: torch.Tensor) -> bool:
    """Whether experts with these weights go through one kernel."""
    return fc1.dtype == torch.bfloat16 and has_grouped_kernel(fc1.device) and not sizes_refused(fc1)


def waits_for_sizes(fc1: torch.Tensor) -> bool:
    """Whether experts with these weights have to be told on the host how many tokens each has."""
    return fc1.is_cuda and not takes_grouped_kernel(fc1)


def grouped_swiglu(
    tokens: torch.Tensor,
    gates: torch.Tensor,
    fc1: torch.nn.Parameter,
    fc2: torch.nn.Parameter,
    tokens_per_expert: torch.Tensor,
    order: Order = BY_EXPERT,
    activation: Activation = PLAIN,
    gives_gradient: bool = True,
) -> torch.Tensor:
    """Each token's sum of `(gate · SiLU(x Wg) ⊙ x Wu) Wd` over its experts.

    Args:
        tokens: x, `[num_tokens, hidden]`.
        gates: `[pairs]`, sorted by expert.
        fc1: `[experts, 2 * ffn, hidden]`, Wg and then Wu.
        fc2: `[experts, hidden, ffn]`, Wd.
        tokens_per_expert: int64 `[experts]`; if it is on a GPU, it is waited for, except with `takes_grouped_kernel`.
        order: of the pairs; without one the tokens are the pairs, sorted by expert.
        activation: what stands between the products.
        gives_gradient: whether the weights get a gradient without values where the true one is in Megatron's buffer, so
            that Megatron's hook sees one; of several calls in one forward pass one has to.

    Returns:
        `[num_tokens, hidden]`.
    """
    if len(gates) and takes_grouped_kernel(fc1):
        if order.ends is None:
            ends = tokens_per_expert.cumsum(0, dtype=torch.int32).to(tokens.device, non_blocking=True)
            order = order._replace(ends=ends)
        sizes = None if tokens_per_expert.is_cuda else tokens_per_expert.tolist()
        return _GroupedSwiGLU.apply(tokens, gates, fc1, fc2, sizes, order, activation, gives_gradient)
    sizes = tokens_per_expert.tolist() if len(gates) else [0] * len(fc1)
    return BlockedSwiGLU.apply(tokens, gates, fc1, fc2, sizes, order, activation, gives_gradient)


class _GroupedSwiGLU(torch.autograd.Function):
    """One kernel for all experts, which takes their sizes from the device; on the host they are None if not known."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        gates: torch.Tensor,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        sizes: list[int] | None,
        order: Order,
        activation: Activation,
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.sizes, ctx.activation, ctx.gives_gradient = sizes, activation, gives_gradient
        ends = order.ends
        hidden = functional.grouped_mm(take(tokens, order.token_index), fc1.transpose(1, 2), offs=ends)
        ctx.save_for_backward(tokens, gates, hidden, *order)
        ctx.weights = fc1, fc2  # saved, they would come back without Megatron's buffer from a checkpointed part
        pairs = functional.grouped_mm(activation.forward(hidden, gates), fc2.transpose(1, 2), offs=ends)
        return sum_pairs(pairs, order, len(tokens))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        tokens, gates, hidden, token_index, by_token, ends = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        gradient = take(gradient, token_index).contiguous()
        d_activated = functional.grouped_mm(gradient, fc2, offs=ends)
        activated, d_hidden, d_gates = ctx.activation.backward(hidden, gates, d_activated)
        rest = ends, ctx.sizes, ctx.gives_gradient
        d_fc2 = _weight_gradient(fc2, gradient, activated, *rest)
        d_fc1 = _weight_gradient(fc1, d_hidden, take(tokens, token_index), *rest)
        d_pairs = functional.grouped_mm(d_hidden, fc1, offs=ends)
        d_tokens = sum_pairs(d_pairs, Order(token_index, by_token, ends), len(tokens))
        return d_tokens, d_gates, d_fc1, d_fc2, None, None, None, None


def _weight_gradient(
    weight: torch.nn.Parameter,
    left: torch.Tensor,
    right: torch.Tensor,
    ends: torch.Tensor,
    sizes: list[int] | None,
    gives_gradient: bool,
) -> torch.Tensor | None:
    """Each expert's `left.T @ right`, or what autograd is to have where it is in Megatron's buffer."""
    main_grad = main_grad_of(weight)
    if main_grad is None or sizes is None or weight[0].numel() < LARGE_MATRIX:
        return into_main_grad(weight, _outers(left, right, ends), gives_gradient)
    add_outers(main_grad, left, right, sizes)
    return gradient_is_in_main_grad(weight, gives_gradient)


def _outers(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each expert's `left.T @ right`: `[pairs, out]`, `[pairs, in]` → `[experts, out, in]`."""
    outers = functional.grouped_mm(left.T, right, offs=ends)
    if _generation(ends.device) == SM100:
        # The kernel leaves something else than zeros for experts without pairs: pytorch/pytorch#172439.
        outers.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0.0)
    return outers
