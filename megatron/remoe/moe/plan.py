"""Who sends how many token-expert pairs to whom, found out once and handed to dispatch, experts and combination."""

import math
from dataclasses import dataclass

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


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
        token_index: int64 `[pairs]`, the token of each pair, in the order of the experts.
        expert_index: int64 `[pairs]`, its expert.
        tokens_per_expert: int64 `[local experts]`, the pairs that arrive; on the host, unless nothing was waited for.
        exchange: None where one rank has all experts.
    """

    token_index: torch.Tensor
    expert_index: torch.Tensor
    tokens_per_expert: torch.Tensor
    exchange: Exchange | None

    def gates(self, probs: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, num_experts]` → `[pairs]`."""
        return probs.reshape(-1).gather(0, self.token_index * probs.shape[1] + self.expert_index)


def count_pairs(routing_map: torch.Tensor, chunks: int, ranks: Ranks) -> torch.Tensor:
    """How many tokens each rank sends to each expert. Waits for the device, once.

    Args:
        routing_map: bool `[num_tokens, num_experts]`.
        chunks: into how many parts of about equal length the tokens are cut.
        ranks: all of which have to call it.

    Returns:
        int64 `[chunks, ranks, num_experts]` on the host.
    """
    counts = torch.stack([part.sum(dim=0) for part in routing_map.tensor_split(chunks)])
    if not ranks.is_alone:
        counts = gather_from_sequence_parallel_region(counts, group=ranks.group)
    return counts.view(ranks.ep * ranks.tp, chunks, -1).transpose(0, 1).cpu()


def count_bounded(routing_map: torch.Tensor, pairs_per_token: float, ranks: Ranks) -> torch.Tensor:
    """As `count_pairs`, in the smallest number of chunks found in which no rank sends or receives too many pairs.

    Args:
        routing_map: bool `[num_tokens, num_experts]`.
        pairs_per_token: the bound, in units of a rank's number of tokens.
        ranks: all of which have to call it.
    """
    num_tokens = routing_map.shape[0]
    limit, chunks = pairs_per_token * num_tokens, 1
    while True:
        counts = count_pairs(routing_map, chunks, ranks)
        # A rank has the experts of one slice, and the tokens of its tensor parallel partners.
        received = counts.sum(dim=1).view(chunks, ranks.ep, -1).sum(dim=2) / ranks.tp
        pairs = max(counts.sum(dim=2).flatten().tolist() + received.flatten().tolist())
        if pairs <= limit or chunks == num_tokens:
            return counts
        chunks = min(num_tokens, max(chunks + 1, math.ceil(chunks * pairs / limit)))


def plan_dispatch(routing_map: torch.Tensor, counts: torch.Tensor, ranks: Ranks) -> DispatchPlan:
    """The plan of a routing map whose counts are known.

    Args:
        routing_map: bool `[num_tokens, num_experts]`.
        counts: int64 `[ranks, num_experts]` on the host, one chunk of `count_pairs`.
        ranks: that it was counted on.
    """
    # The group's ranks go through tensor parallelism first.
    sent = counts.view(ranks.ep, ranks.tp, -1).transpose(0, 1)
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
    return _plan(routing_map, sum(mine.tolist()), received.sum(dim=(0, 1)), exchange)


def plan_known(routing_map: torch.Tensor, topk: int) -> DispatchPlan:
    """The plan where each token has `topk` experts and one rank has all of them: nothing is counted or waited for."""
    return _plan(routing_map, len(routing_map) * topk, routing_map.sum(dim=0), None)


def _plan(
    routing_map: torch.Tensor, num_pairs: int, tokens_per_expert: torch.Tensor, exchange: Exchange | None
) -> DispatchPlan:
    expert_index, token_index = torch.nonzero_static(routing_map.T, size=num_pairs).unbind(dim=1)
    return DispatchPlan(token_index, expert_index, tokens_per_expert, exchange)
