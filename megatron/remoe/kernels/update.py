"""λ's update: from the counts of all layers to what all routers take over (paper section 3.3), in one launch."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096


def decide(
    tokens_per_expert: torch.Tensor,
    tokens: torch.Tensor,
    l1_loss: torch.Tensor,
    not_finite: torch.Tensor,
    guarded: torch.Tensor,
    l1_exponent: torch.Tensor,
    routers: torch.Tensor,
    topk: int,
    least_active: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exponent of λ after a step, and the layers to guard in the next.

    Args:
        tokens_per_expert: float64 `[layers, experts]`, a view of the table of counts.
        tokens, l1_loss, not_finite, guarded, l1_exponent, routers: float64 `[layers]`, columns of the same table.
        topk: active experts per token, as they should be over all layers.
        least_active: experts per token, below which a layer is guarded.

    Returns:
        An int64 scalar, and int64 `[layers]`, 1 where a layer is to be guarded.
    """
    layers, experts = tokens_per_expert.shape
    exponent = torch.empty((), dtype=torch.int64, device=tokens.device)
    guards = torch.empty(layers, dtype=torch.int64, device=tokens.device)
    height = triton.next_power_of_2(layers)
    _decide[(1,)](
        tokens_per_expert, tokens, l1_loss, not_finite, guarded, l1_exponent, routers, exponent, guards,
        tokens_per_expert.stride(0), L=layers, E=experts, TOPK=topk, LEAST=least_active,
        HEIGHT=height, WIDTH=min(triton.next_power_of_2(experts), max(1, BLOCK // height)),
    )  # fmt: skip
    return exponent, guards


def _decide_bytes(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": "λ's update", "bytes": 8 * (args["L"] * (args["E"] + 7) + 1)}


@triton.jit(launch_metadata=_decide_bytes)
def _decide(
    pairs_LE, tokens_L, l1_loss_L, not_finite_L, guarded_L, exponent_L, routers_L, exponent, guards_L, stride,
    L: tl.constexpr, E: tl.constexpr, TOPK: tl.constexpr, LEAST: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program; reads the table once, 8·L·E bytes. A layer's numbers are `stride` elements from the next one's."""
    layer = tl.arange(0, HEIGHT)
    is_layer, row = layer < L, layer * stride
    active = tl.zeros([HEIGHT], tl.float64)
    for first in range(0, E, WIDTH):
        expert = first + tl.arange(0, WIDTH)
        is_inside = is_layer[:, None] & (expert < E)[None, :]
        active += tl.sum(tl.load(pairs_LE + row[:, None] + expert[None, :], mask=is_inside, other=0.0), axis=1)
    tokens = tl.load(tokens_L + row, mask=is_layer, other=0.0)
    losses = tl.load(l1_loss_L + row, mask=is_layer, other=0.0) + tl.load(not_finite_L + row, mask=is_layer, other=0.0)
    is_finite = tl.abs(tl.sum(losses)) < float("inf")
    above = tl.sum(active) - TOPK * tl.sum(tokens)
    direction = tl.where(is_finite, (above > 0).to(tl.int64) - (above < 0).to(tl.int64), 0)
    exponents = tl.sum(tl.load(exponent_L + row, mask=is_layer, other=0.0))
    routers = tl.maximum(tl.sum(tl.load(routers_L + row, mask=is_layer, other=0.0)), 1.0)
    tl.store(exponent, tl.floor(exponents / routers + 0.5).to(tl.int64) + direction)
    was_guarded = tl.load(guarded_L + row, mask=is_layer, other=0.0) > 0
    tl.store(guards_L + layer, tl.where(is_finite, active < LEAST * tokens, was_guarded).to(tl.int64), mask=is_layer)
