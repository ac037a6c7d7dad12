"""All experts of a layer at once: bias-free SwiGLU over stacked weights, forward and backward.

PyTorch's own kernels, in as few passes over memory as they allow. Only the tokens and the product of the first matrix
are kept for the backward pass, and weight gradients go straight into Megatron's buffer where it has their type.
"""

from typing import Any

import torch
from torch.nn.functional import grouped_mm

from megatron.remoe.local.blocked_swiglu import BlockedSwiGLU
from megatron.remoe.local.swiglu import Gradients, activate, activate_backward, into_main_grad, sum_pairs, take


def grouped_swiglu(
    tokens: torch.Tensor,
    gates: torch.Tensor,
    fc1: torch.nn.Parameter,
    fc2: torch.nn.Parameter,
    tokens_per_expert: torch.Tensor,
    token_index: torch.Tensor | None = None,
    gives_gradient: bool = True,
) -> torch.Tensor:
    """Each token's sum of `(gate · SiLU(x Wg) ⊙ x Wu) Wd` over its experts.

    Args:
        tokens: x, `[num_tokens, hidden]`.
        gates: `[pairs]`, sorted by expert.
        fc1: `[experts, 2 * ffn, hidden]`, Wg and then Wu.
        fc2: `[experts, hidden, ffn]`, Wd.
        tokens_per_expert: int64 `[experts]`; on the host, unless the tokens are half precision on a GPU.
        token_index: int64 `[pairs]`, the token of each pair; None where the tokens are the pairs, in their order.
        gives_gradient: whether the weights get a gradient without values where the true one is in Megatron's buffer, so
            that Megatron's hook sees one; of several calls in one forward pass one has to.

    Returns:
        `[num_tokens, hidden]`.
    """
    if tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16):
        ends = tokens_per_expert.cumsum(0).to(device=tokens.device, dtype=torch.int32, non_blocking=True)
        return _GroupedSwiGLU.apply(tokens, gates, fc1, fc2, ends, token_index, gives_gradient)
    return BlockedSwiGLU.apply(tokens, gates, fc1, fc2, tokens_per_expert.tolist(), token_index, gives_gradient)


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
        token_index: torch.Tensor | None,
        gives_gradient: bool,
    ) -> torch.Tensor:
        ctx.gives_gradient = gives_gradient
        hidden = grouped_mm(take(tokens, token_index), fc1.transpose(1, 2), offs=ends)
        ctx.save_for_backward(tokens, gates, hidden, ends, token_index)
        ctx.weights = fc1, fc2  # saved, they would come back without Megatron's buffer from a checkpointed part
        return sum_pairs(grouped_mm(activate(hidden, gates), fc2.transpose(1, 2), offs=ends), token_index, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Gradients:
        tokens, gates, hidden, ends, token_index = ctx.saved_tensors
        fc1, fc2 = ctx.weights
        gradient = take(gradient, token_index).contiguous()
        d_activated = grouped_mm(gradient, fc2, offs=ends)
        activated, d_hidden, d_gates = activate_backward(hidden, gates, d_activated)
        d_fc2 = into_main_grad(fc2, grouped_mm(gradient.T, activated, offs=ends), ctx.gives_gradient)
        d_fc1 = into_main_grad(fc1, grouped_mm(d_hidden.T, take(tokens, token_index), offs=ends), ctx.gives_gradient)
        d_tokens = sum_pairs(grouped_mm(d_hidden, fc1, offs=ends), token_index, tokens)
        return d_tokens, d_gates, d_fc1, d_fc2, None, None, None
