"""List the rows of each expert and of each token in a routing map, without nonzero, sort or atomics.

T tokens, E experts, P pairs, B blocks of tokens. A program handles one block and loops over tiles of experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2

# Each program holds the counts of all blocks for a tile of experts in registers, so there are few blocks.
MOST_BLOCKS, LEAST_TOKENS, TILE_COUNTS, WARPS = 256, 16, 8192, 8
SPREAD = 1024  # elements of the map that a program of `_spread` handles at once


def count_blocks(routing_map: torch.Tensor) -> torch.Tensor:
    """Count the tokens that each expert has in each block of tokens; moves the map once.

    Args:
        routing_map: bool `[T, E]`.

    Returns:
        int32 `[E, B]`.
    """
    num_tokens, num_experts = routing_map.shape
    block, tile = choose_tile(num_tokens, num_experts)
    blocks = cdiv(max(num_tokens, 1), block)
    counts = torch.empty(num_experts, blocks, dtype=torch.int32, device=routing_map.device)
    _count[(blocks,)](
        routing_map.contiguous(), counts, num_tokens, num_experts, BLOCK=block, TILE=tile, num_warps=WARPS
    )
    return counts


class _Fill(torch.autograd.Function):
    """Sort the pairs by expert, then by token.

    Moves the map once, and the gate, token index and row index of each pair; the backward pass also writes `[T, E]`.

    Args:
        probs: `[T, E]`, the gates.
        routing_map: bool `[T, E]`.
        counts: int32 `[E, B]`, as `count_blocks` returns them for this map.
        num_pairs: P, the number of True elements of the map. If it is too low, pairs are missing, but no index is out
            of range.

    Returns:
        token_index: int32 `[P]`, the token of each pair.
        by_token: int32 `[T + 1 + P]`. The rows of token t's pairs are `by_token[by_token[t] : by_token[t + 1]]`.
        gates: `[P]`, of the type of `probs`; the only one with a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, probs: torch.Tensor, routing_map: torch.Tensor, counts: torch.Tensor, num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        routing_map, (num_tokens, num_experts) = routing_map.contiguous(), routing_map.shape
        token_index = torch.empty(num_pairs, dtype=torch.int32, device=probs.device)
        by_token = torch.empty(num_tokens + 1 + num_pairs, dtype=torch.int32, device=probs.device)
        gates = torch.empty(num_pairs, dtype=probs.dtype, device=probs.device)
        (block, tile), blocks = choose_tile(num_tokens, num_experts), counts.shape[1]
        _fill[(blocks,)](
            probs.contiguous(), routing_map, counts, token_index, by_token, gates, num_tokens, num_experts,
            blocks, num_pairs, BLOCK=block, TILE=tile, BLOCKS=next_power_of_2(blocks), num_warps=WARPS,
        )  # fmt: skip
        ctx.save_for_backward(routing_map, by_token)
        ctx.mark_non_differentiable(token_index, by_token)
        ctx.set_materialize_grads(False)
        return token_index, by_token, gates

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if (d_gates := gradients[-1]) is None:
            return None, None, None, None
        routing_map, by_token = ctx.saved_tensors
        num_tokens, num_experts = routing_map.shape
        d_probs = torch.empty(num_tokens, num_experts, dtype=d_gates.dtype, device=d_gates.device)
        tile = min(next_power_of_2(num_experts), 64)
        block = SPREAD // tile
        grid = (cdiv(num_tokens, block),)
        _spread[grid](
            d_gates.contiguous(), routing_map, by_token, d_probs, num_tokens, num_experts, len(d_gates),
            BLOCK=block, TILE=tile,
        )  # fmt: skip
        return d_probs, None, None, None


fill = _Fill.apply


def choose_tile(num_tokens: int, num_experts: int) -> tuple[int, int]:
    """Return the number of tokens in a block, and of experts that a program handles at once."""
    block = max(LEAST_TOKENS, next_power_of_2(cdiv(num_tokens, MOST_BLOCKS)))
    return block, min(next_power_of_2(num_experts), max(1, TILE_COUNTS // max(2 * block, MOST_BLOCKS)))


def _fill_bytes(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that a launch moves: of `probs_TE` it reads one gate for each pair."""
    pairs = args["gates_P"].numel() * (2 * args["gates_P"].element_size() + 4)
    once = args["map_TE"].numel() + 4 * (args["counts_EB"].numel() + args["by_token"].numel())
    return {"bytes": once + pairs}


@triton.jit
def _count(map_TE, counts_EB, num_tokens, num_experts, BLOCK: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for first in range(0, num_experts, TILE):
        expert = first + tl.arange(0, TILE)
        active = _active(map_TE, token, expert, num_tokens, num_experts)
        place = counts_EB + expert * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(active, axis=0), mask=expert < num_experts)


# The number of pairs changes with each launch. If specialized for it, the kernel would be recompiled during training.
@triton.jit(launch_metadata=_fill_bytes, do_not_specialize=["num_pairs"])
def _fill(
    probs_TE, map_TE, counts_EB, token_index_P, by_token, gates_P, num_tokens, num_experts, num_blocks, num_pairs,
    BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs_per_token = tl.zeros([BLOCK], tl.int32)
    before = 0  # pairs of the blocks before
    for first in range(0, num_experts, TILE):
        expert = first + tl.arange(0, TILE)
        pairs_per_token += tl.sum(_active(map_TE, token, expert, num_tokens, num_experts), axis=1)
        _, in_blocks_before = _counted(counts_EB, expert, num_experts, num_blocks, BLOCKS)
        before += tl.sum(in_blocks_before)
    last = num_tokens + 1 + num_pairs
    ends = num_tokens + 1 + before + tl.cumsum(pairs_per_token, axis=0)
    tl.store(by_token + 1 + token, tl.minimum(ends, last), mask=token < num_tokens)
    tl.store(by_token, num_tokens + 1, mask=tl.program_id(0) == 0)
    place = ends - pairs_per_token
    expert_start = 0
    for first in range(0, num_experts, TILE):
        expert = first + tl.arange(0, TILE)
        active = _active(map_TE, token, expert, num_tokens, num_experts)
        total, in_blocks_before = _counted(counts_EB, expert, num_experts, num_blocks, BLOCKS)
        expert_ends = expert_start + tl.cumsum(total, axis=0)
        row = (expert_ends - total + in_blocks_before)[None, :] + tl.cumsum(active, axis=0) - active
        is_active = active > 0
        has_row = is_active & (row < num_pairs)
        gate = tl.load(probs_TE + element(token, expert, num_experts), mask=has_row)
        tl.store(gates_P + row, gate, mask=has_row)
        tl.store(token_index_P + row, token[:, None] + tl.zeros_like(row), mask=has_row)
        at = place[:, None] + tl.cumsum(active, axis=1) - active
        tl.store(by_token + at, tl.minimum(row, num_pairs - 1), mask=is_active & (at < last))
        place += tl.sum(active, axis=1)
        expert_start += tl.sum(total)


@triton.jit(do_not_specialize=["num_pairs"])
def _spread(
    d_gates_P, map_TE, by_token, d_probs_TE, num_tokens, num_experts, num_pairs, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(by_token + token, mask=token < num_tokens, other=0)
    for first in range(0, num_experts, TILE):
        expert = first + tl.arange(0, TILE)
        active = _active(map_TE, token, expert, num_tokens, num_experts)
        is_active = active > 0
        at = place[:, None] + tl.cumsum(active, axis=1) - active
        has_row = is_active & (at < num_tokens + 1 + num_pairs)
        row = tl.load(by_token + at, mask=has_row, other=0)
        gradient = tl.load(d_gates_P + row, mask=has_row, other=0.0)
        is_inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
        tl.store(d_probs_TE + element(token, expert, num_experts), gradient, mask=is_inside)
        place += tl.sum(active, axis=1)


@triton.jit
def element(token, expert, num_experts):
    """Return the offsets in a contiguous `[T, E]`, int64 `[tokens, experts]`."""
    return token.to(tl.int64)[:, None] * num_experts + expert[None, :]


@triton.jit
def _active(map_TE, token, expert, num_tokens, num_experts):
    """Load the map as int32 `[tokens, experts]`, 1 where it is True."""
    is_inside = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    return tl.load(map_TE + element(token, expert, num_experts), mask=is_inside, other=0).to(tl.int32)


@triton.jit
def _counted(counts_EB, expert, num_experts, num_blocks, BLOCKS: tl.constexpr):
    """Sum the counts, int32 `[experts]`: of all blocks, and of those before this program's."""
    block = tl.arange(0, BLOCKS)
    is_inside = (expert < num_experts)[:, None] & (block < num_blocks)[None, :]
    counts = tl.load(counts_EB + expert[:, None] * num_blocks + block[None, :], mask=is_inside, other=0)
    return tl.sum(counts, axis=1), tl.sum(tl.where(block[None, :] < tl.program_id(0), counts, 0), axis=1)
