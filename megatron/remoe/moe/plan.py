"""Who sends how many token-expert pairs to whom, found out once and handed to dispatch, experts and combination."""

import math
from dataclasses import dataclass

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.remoe.local.swiglu import Order


@dataclass(frozen=True)
class Ranks:
    """The ranks that exchange tokens, `ep` slices of experts that `tp` ranks each share, and which of them this is."""

    group: torch.distributed.ProcessGroup
    ep: int
    ep_rank: int
    tp: int
    tp_rank: int

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> "Ranks":
        """Those of the groups `tp_ep`, `ep` and `expt_tp`."""
        return cls(groups.tp_ep, groups.ep.size(), groups.ep.rank(), groups.expt_tp.size(), groups.expt_tp.rank())

    @property
    def is_alone(self) -> bool:
        """Whether this rank has all experts, whole."""
        return self.ep == self.tp == 1


@dataclass(frozen=True)
class Exchange:
    """What the collectives of a dispatch are told, on the host.

    Attributes:
        sent: int64 `[ep]`, pairs that this rank sends to each slice of experts.
        received: int64 `[ep]`, pairs that it gets from each.
        gathered: int64 `[tp]`, pairs that each of the ranks with the same experts then has.
        per_expert: int64 `[ep * tp, local experts]`, what each rank's tokens bring to each expert here.
    """

    sent: torch.Tensor
    received: torch.Tensor
    gathered: torch.Tensor
    per_expert: torch.Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """The way of a layer's tokens, or of one chunk of them, to their experts.

    Attributes:
        order: of the pairs.
        gates: `[pairs]`.
        tokens_per_expert: int `[local experts]`, the pairs that arrive; on the host, unless nothing was waited for.
        exchange: None where one rank has all experts.
    """

    order: Order
    gates: torch.Tensor
    tokens_per_expert: torch.Tensor
    exchange: Exchange | None


@dataclass(frozen=True)
class Counts:
    """What is counted of a layer's tokens, or of one chunk of them, before they are planned.

    Attributes:
        pairs: int64 `[ranks, num_experts]` on the host, tokens that each rank sends to each expert.
        blocks: of `kernels.plan.count_blocks`, this rank's; None without kernels.
    """

    pairs: torch.Tensor
    blocks: torch.Tensor | None


def count_pairs(routing_map: torch.Tensor, chunks: int, ranks: Ranks, kernels: bool = False) -> list[Counts]:
    """How many tokens each rank sends to each expert. Waits for the device, once.

    Args:
        routing_map: bool `[num_tokens, num_experts]`.
        chunks: into how many parts of about equal length the tokens are cut.
        ranks: all of which have to call it.
        kernels: whether Triton's count.

    Returns:
        Those of each chunk.
    """
    maps = routing_map.tensor_split(chunks)
    blocks: list[torch.Tensor | None] = [None] * chunks
    if kernels:
        from megatron.remoe.kernels.plan import count_blocks

        counted = [count_blocks(part) for part in maps]
        blocks, parts = [*counted], [_sum_blocks(counts) for counts in counted]
    else:
        parts = [part.sum(dim=0) for part in maps]
    counts = torch.stack(parts) if chunks > 1 else parts[0].unsqueeze(0)
    if not ranks.is_alone:
        counts = gather_from_sequence_parallel_region(counts, group=ranks.group)
    pairs = counts.view(ranks.ep * ranks.tp, chunks, -1).transpose(0, 1).cpu().long()
    return [Counts(*chunk) for chunk in zip(pairs, blocks, strict=True)]


def _sum_blocks(counts: torch.Tensor) -> torch.Tensor:
    """Of `kernels.plan.count_blocks`; another type than theirs would be one launch more."""
    return counts.sum(dim=1, dtype=counts.dtype)


def count_bounded(
    routing_map: torch.Tensor, pairs_per_token: float, ranks: Ranks, kernels: bool = False
) -> list[Counts]:
    """As `count_pairs`, in the smallest number of chunks found in which no rank sends or receives too many pairs.

    Args:
        routing_map: bool `[num_tokens, num_experts]`.
        pairs_per_token: the bound, in units of a rank's number of tokens.
        ranks: all of which have to call it.
        kernels: whether Triton's count.
    """
    num_tokens = routing_map.shape[0]
    limit, chunks = pairs_per_token * num_tokens, 1
    while True:
        counts = count_pairs(routing_map, chunks, ranks, kernels)
        # A rank has the experts of one slice, and the tokens of its tensor parallel partners.
        pairs = torch.stack([chunk.pairs for chunk in counts])
        received = pairs.sum(dim=1).view(chunks, ranks.ep, -1).sum(dim=2) / ranks.tp
        most = max(pairs.sum(dim=2).flatten().tolist() + received.flatten().tolist())
        if most <= limit or chunks == num_tokens:
            return counts
        chunks = min(num_tokens, max(chunks + 1, math.ceil(chunks * most / limit)))


def plan_dispatch(
    probs: torch.Tensor, routing_map: torch.Tensor, counts: Counts, ranks: Ranks, kernels: bool = False
) -> DispatchPlan:
    """The plan of a routing map whose counts are known.

    Args:
        probs: `[num_tokens, num_experts]`.
        routing_map: bool `[num_tokens, num_experts]`.
        counts: of `count_pairs`, for this map.
        ranks: that it was counted on.
        kernels: whether Triton's make it.
    """
    # The group's ranks go through tensor parallelism first.
    sent = counts.pairs.view(ranks.ep, ranks.tp, -1).transpose(0, 1)
    mine = sent[ranks.tp_rank, ranks.ep_rank]
    received = sent.unflatten(2, (ranks.ep, -1))[:, :, ranks.ep_rank]
    exchange = None
    if not ranks.is_alone:
        exchange = Exchange(
            sent=mine.view(ranks.ep, -1).sum(dim=1),
            received=received[ranks.tp_rank].sum(dim=1),
            gathered=received.sum(dim=(1, 2)),
            per_expert=received.flatten(0, 1),
        )
    arriving = received.sum(dim=(0, 1))
    return _plan(probs, routing_map, sum(mine.tolist()), arriving, counts.blocks, exchange, kernels)


def plan_known(probs: torch.Tensor, routing_map: torch.Tensor, topk: int, kernels: bool = False) -> DispatchPlan:
    """The plan where each token has `topk` experts and one rank has all of them: nothing is waited for."""
    return _plan(probs, routing_map, len(routing_map) * topk, None, None, None, kernels)


def _plan(
    probs: torch.Tensor,
    routing_map: torch.Tensor,
    num_pairs: int,
    tokens_per_expert: torch.Tensor | None,
    blocks: torch.Tensor | None,
    exchange: Exchange | None,
    kernels: bool,
) -> DispatchPlan:
    """`tokens_per_expert` and `blocks` are None where nothing was counted before."""
    if kernels:
        from megatron.remoe.kernels.plan import count_blocks, fill

        blocks = count_blocks(routing_map) if blocks is None else blocks
        *order, gates = fill(probs, routing_map, blocks, num_pairs)
        arriving = _sum_blocks(blocks) if tokens_per_expert is None else tokens_per_expert
        return DispatchPlan(Order(*order), gates, arriving, exchange)
    expert_index, token_index = torch.nonzero_static(routing_map.T, size=num_pairs).unbind(dim=1)
    gates = probs.reshape(-1).gather(0, token_index * probs.shape[1] + expert_index)
    arriving = routing_map.sum(dim=0) if tokens_per_expert is None else tokens_per_expert
    return DispatchPlan(Order(token_index), gates, arriving, exchange)
