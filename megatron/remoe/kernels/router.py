"""The ReLU router after its product: gates, map, counts, and the gradients of λ · L_reg and of the guard.

T tokens, E experts, P programs of as many tokens each. Two launches forward, one backward; no atomics, so that sums are
the same each time.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.remoe.kernels import cdiv, next_power_of_2
from megatron.remoe.kernels.backend import Regularization

# One program sums the counts of all, so launch few.
MOST_PROGRAMS, LEAST_TOKENS, BLOCK, TERMS_BLOCK, TERMS_WARPS = 128, 16, 2048, 8192, 8


class _ReLURouting(torch.autograd.Function):
    """Compute `pytorch.relu_routing`, with the same arguments and results."""

    @staticmethod
    def forward(
        ctx: Any,
        regularization: Regularization,
        logits: torch.Tensor,
        padding_mask: torch.Tensor | None,
        exponent: torch.Tensor,
        guarded: torch.Tensor,
        counts: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        per_token: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, (num_tokens, num_experts) = logits.contiguous(), logits.shape
        span = max(LEAST_TOKENS, cdiv(num_tokens, MOST_PROGRAMS))
        programs = max(1, cdiv(num_tokens, span))
        probs, routing_map = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bool)
        pairs = logits.new_empty(programs, num_experts + 1, dtype=torch.int32)
        sums = logits.new_empty(programs, num_experts, dtype=torch.float32)
        terms = logits.new_empty(num_experts + 1, dtype=torch.float32)
        width = next_power_of_2(num_experts)
        _gates[(programs,)](
            logits, padding_mask, probs, routing_map, pairs, sums, num_tokens, span,
            E=num_experts, BLOCK=min(next_power_of_2(span), max(1, BLOCK // width)), WIDTH=width,
        )  # fmt: skip
        of_sequence = None
        if group.size() > 1:  # its tokens are split over tensor (sequence) and context parallel ranks
            of_sequence = pairs.sum(dim=0)
            torch.distributed.all_reduce(of_sequence, group=group)
        _terms[(1,)](
            pairs, sums, of_sequence, exponent, guarded, counts, terms, programs,
            E=num_experts, TOPK=regularization.topk, RANKS=group.size(), BALANCES=regularization.balances,
            INIT=regularization.init, LOG2=math.log2(regularization.multiplier), GUARD=regularization.guard,
            PER_TOKEN=per_token, BLOCK=min(next_power_of_2(programs), max(1, TERMS_BLOCK // width)), WIDTH=width,
            num_warps=TERMS_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(routing_map, terms)
        ctx.mark_non_differentiable(routing_map)
        ctx.set_materialize_grads(False)  # otherwise PyTorch writes zeros for the map
        ctx.dtype = probs.dtype
        return probs, routing_map

    @staticmethod
    def backward(ctx: Any, d_probs: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        routing_map, terms = ctx.saved_tensors
        if d_probs is None:  # λ · L_reg has a gradient even if the gates have none
            d_probs = torch.zeros_like(routing_map, dtype=ctx.dtype)
        d_probs = d_probs.contiguous()
        d_logits = torch.empty_like(d_probs)
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale  # set by Megatron between forward and backward
        _gradient[(cdiv(d_probs.numel(), BLOCK),)](
            d_probs, routing_map, terms, scale, d_logits, d_probs.numel(), E=d_probs.shape[1], BLOCK=BLOCK
        )
        return None, d_logits, *[None] * 6


relu_routing = _ReLURouting.apply


def _terms_bytes(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, Any]:
    counted = args["pairs_PC"].nbytes + args["sums_PE"].nbytes
    return {"name": "router: L1 and counts", "bytes": counted + args["terms_C"].nbytes + 16 * (args["E"] + 3)}


@triton.jit
def _gates(
    logits_TE, padding_T, probs_TE, map_TE, pairs_PC, sums_PE, num_tokens, span,
    E: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write gates and map, and each program's sums: the pairs of each expert and then its tokens, C = E + 1, and the
    gates of each expert, fp32. Moves logits, gates and map once: T·E·(2·size + 1) bytes.
    """
    program, expert = tl.program_id(0), tl.arange(0, WIDTH)
    pairs = tl.zeros([WIDTH], tl.int32)
    sums = tl.zeros([WIDTH], tl.float32)
    tokens = tl.zeros([BLOCK], tl.int32)
    end = tl.minimum((program + 1) * span, num_tokens)
    for first in range(program * span, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        is_routed = token < end
        is_inside = is_routed[:, None] & (expert < E)[None, :]
        if padding_T is not None:
            is_routed &= tl.load(padding_T + token, mask=is_routed, other=1) == 0
        at = token.to(tl.int64)[:, None] * E + expert[None, :]
        logit = tl.load(logits_TE + at, mask=is_inside, other=0.0)
        if logit.dtype != tl.float64:
            logit = logit.to(tl.float32)  # Triton's interpreter compares the bits of bf16
        is_active = (logit > 0) & is_routed[:, None]
        gate = tl.where(is_active, logit, 0.0)
        tl.store(probs_TE + at, gate, mask=is_inside)
        tl.store(map_TE + at, is_active, mask=is_inside)
        pairs += tl.sum(is_active.to(tl.int32), axis=0)
        sums += tl.sum(gate.to(tl.float32), axis=0)
        tokens += is_routed.to(tl.int32)
    tl.store(pairs_PC + program * (E + 1) + expert, pairs, mask=expert < E)
    tl.store(pairs_PC + program * (E + 1) + E, tl.sum(tokens))
    tl.store(sums_PE + program * E + expert, sums, mask=expert < E)


@triton.jit(launch_metadata=_terms_bytes)
def _terms(
    pairs_PC, sums_PE, of_sequence_C, exponent, guarded, counts, terms_C, programs,
    E: tl.constexpr, TOPK: tl.constexpr, RANKS: tl.constexpr, BALANCES: tl.constexpr, INIT: tl.constexpr,
    LOG2: tl.constexpr, GUARD: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add to the counts, and write the gradient of λ · L_reg for each expert's gates, then the guard's where they are
    off, C = E + 1, fp32. One program; moves 8·P·E bytes. `of_sequence_C` is None if this rank has whole sequences.
    """
    expert = tl.arange(0, WIDTH)
    is_expert = expert < E
    own_pairs = tl.zeros([WIDTH], tl.int32)
    own_tokens = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([WIDTH], tl.float32)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        is_program, row = program < programs, program * (E + 1)
        is_inside = is_program[:, None] & is_expert[None, :]
        own_pairs += tl.sum(tl.load(pairs_PC + row[:, None] + expert[None, :], mask=is_inside, other=0), axis=0)
        own_tokens += tl.load(pairs_PC + row + E, mask=is_program, other=0)
        sums += tl.sum(tl.load(sums_PE + program[:, None] * E + expert[None, :], mask=is_inside, other=0.0), axis=0)
    pairs, own = own_pairs.to(tl.float64), tl.sum(own_tokens).to(tl.float64)
    tokens = own
    tl.store(counts + expert, tl.load(counts + expert, mask=is_expert) + pairs, mask=is_expert)
    tl.store(counts + E, tl.load(counts + E) + own)
    if of_sequence_C is not None:
        pairs = tl.load(of_sequence_C + expert, mask=is_expert, other=0).to(tl.float64)
        tokens = tl.load(of_sequence_C + E).to(tl.float64)
    tokens = tl.maximum(tokens, 1.0)
    weight = tl.full([WIDTH], 1.0, tl.float64) / tokens
    if BALANCES:
        weight *= pairs * (E / TOPK) / tokens
    tl.store(counts + E + 1, tl.load(counts + E + 1) + tl.sum(sums.to(tl.float64) * weight))
    tl.store(counts + E + 2, tl.load(counts + E + 2) + 1.0 / RANKS)

    is_guarded = tl.load(guarded).to(tl.float64)
    coefficient = INIT * tl.exp2(tl.load(exponent).to(tl.float64) * LOG2) * (1.0 - is_guarded)
    push = 0.0 - GUARD * is_guarded / (tokens * E)
    if PER_TOKEN:
        coefficient, push = coefficient * own * RANKS, push * own * RANKS
    tl.store(terms_C + expert, (coefficient * weight).to(tl.float32), mask=is_expert)
    tl.store(terms_C + E, push.to(tl.float32))


@triton.jit
def _gradient(d_probs_TE, map_TE, terms_C, scale, d_logits_TE, size, E: tl.constexpr, BLOCK: tl.constexpr):
    """Write the logits' gradient; moves T·E·(2·size + 1) bytes. `scale` has one element, or is None for 1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < size
    is_active = tl.load(map_TE + at, mask=is_inside, other=0) != 0
    term = tl.load(terms_C + tl.where(is_active, at % E, E), mask=is_inside, other=0.0)
    if scale is not None:
        term *= tl.load(scale).to(tl.float32)
    d_probs = tl.load(d_probs_TE + at, mask=is_inside & is_active, other=0.0)
    tl.store(d_logits_TE + at, (d_probs + term).to(d_probs.dtype), mask=is_inside)
