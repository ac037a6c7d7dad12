"""Compute ReLU with its map and sums, and its gradient, in one kernel each. Without atomics, sums have a fixed order.

T tokens, E experts, B blocks of tokens.
"""

import torch
import triton
import triton.language as tl
from triton import cdiv

from megatron.remoe.kernels.plan import WARPS, choose_tile, element

BLOCK = 2048


def gate(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `pytorch.gate`; reads the logits and writes gates and map once."""
    logits, (num_tokens, num_experts) = logits.contiguous(), logits.shape
    block, tile = choose_tile(num_tokens, num_experts)
    blocks = cdiv(max(num_tokens, 1), block)
    probs, routing_map = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bool)
    counts = logits.new_empty(num_experts, blocks, dtype=torch.int32)
    sums = logits.new_empty(num_experts, blocks, dtype=torch.float32)
    _gates[(blocks,)](
        logits, probs, routing_map, counts, sums, num_tokens, num_experts, BLOCK=block, TILE=tile, num_warps=WARPS,
    )  # fmt: skip
    return probs, routing_map, counts, sums.sum(dim=1)


def gate_backward(
    d_probs: torch.Tensor, routing_map: torch.Tensor, on: torch.Tensor, off: torch.Tensor
) -> torch.Tensor:
    """Compute `pytorch.gate_backward`; moves at most T·E·(2·size + 1) bytes, with elements of `size` bytes."""
    d_probs = d_probs.contiguous()
    d_logits = torch.empty_like(d_probs)
    size, num_experts = d_probs.numel(), d_probs.shape[1]
    _gradient[(cdiv(size, BLOCK),)](d_probs, routing_map, on, off, d_logits, size, E=num_experts, BLOCK=BLOCK)
    return d_logits


@triton.jit
def _gates(
    logits_TE, probs_TE, map_TE, counts_EB, sums_EB, num_tokens, num_experts, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    for first in range(0, num_experts, TILE):
        expert = first + tl.arange(0, TILE)
        is_inside = is_token[:, None] & (expert < num_experts)[None, :]
        at = element(token, expert, num_experts)
        logit = tl.load(logits_TE + at, mask=is_inside, other=0.0)
        if logit.dtype != tl.float64:
            logit = logit.to(tl.float32)  # Triton's interpreter compares the bits of bf16
        is_active = logit > 0
        gate = tl.where(is_active, logit, 0.0)
        tl.store(probs_TE + at, gate, mask=is_inside)
        tl.store(map_TE + at, is_active, mask=is_inside)
        place = expert * tl.num_programs(0) + tl.program_id(0)
        tl.store(counts_EB + place, tl.sum(is_active.to(tl.int32), axis=0), mask=expert < num_experts)
        tl.store(sums_EB + place, tl.sum(gate.to(tl.float32), axis=0), mask=expert < num_experts)


@triton.jit
def _gradient(d_probs_TE, map_TE, on_E, off, d_logits_TE, size, E: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < size
    is_active = tl.load(map_TE + at, mask=is_inside, other=0) != 0
    d_probs = tl.load(d_probs_TE + at, mask=is_inside & is_active, other=0.0)
    on = tl.load(on_E + at % E, mask=is_inside, other=0.0)
    tl.store(d_logits_TE + at, tl.where(is_active, d_probs + on, tl.load(off)).to(d_probs.dtype), mask=is_inside)
