"""Count the pairs that ranks send each other, once per layer and step, for dispatch, experts and combine.

T tokens on this rank, E experts in all, L of them on this rank, P pairs (of a token here and an expert that is active
for it), C chunks of tokens, R ranks that exchange tokens.
"""

import math
from dataclasses import dataclass

import torch

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.remoe.kernels.backend import Backend, Order


@dataclass(frozen=True)
class Exchange:
    """The sizes of a dispatch's collectives, on the host.

    Attributes:
        sent: int64 `[ep]`, pairs that this rank sends to each slice of experts.
        received: int64 `[ep]`, pairs that it receives from each.
        gathered: int64 `[tp]`, pairs that each rank with the same experts has after that.
        per_expert: int64 `[R, L]`, pairs from each rank's tokens for each expert here.
    """

    sent: torch.Tensor
    received: torch.Tensor
    gathered: torch.Tensor
    per_expert: torch.Tensor


@dataclass(frozen=True)
class Counts:
    """The numbers of pairs of a layer's tokens, or of one chunk.

    Attributes:
        num_pairs: P, or an upper bound.
        tokens_per_expert: integers `[L]`, the pairs that arrive at each expert here; on the device if the host did not
            wait for them, else on the host.
        exchange: None if one rank has all experts.
        counted: the backend's own counts, for its `plan`.
    """

    num_pairs: int
    tokens_per_expert: torch.Tensor
    exchange: Exchange | None
    counted: torch.Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """The way of a layer's tokens, or of one chunk, to their experts and back. Gradients flow through `gates_P`."""

    order: Order
    gates_P: torch.Tensor
    counts: Counts


def count_pairs(
    map_TE: torch.Tensor, dispatcher: MoETokenDispatcher, backend: Backend, limit: float = 0.0
) -> list[Counts]:
    """Count the tokens that each rank sends to each expert, in enough chunks to keep each one within a limit.

    Waits for the device once for each number of chunks that it tries.

    Args:
        map_TE: bool `[T, E]`.
        dispatcher: of the layer; all ranks of its `tp_ep_group` must call this function.
        backend: counts the pairs.
        limit: maximum number of pairs per token that a rank sends or receives at once; 0 for none.

    Returns:
        The `Counts` of each chunk; chunks are cut as by `tensor_split`.
    """
    num_tokens, bound, chunks = len(map_TE), limit * len(map_TE), 1
    while True:
        pairs_CRE, counted = read_pairs(map_TE, chunks, dispatcher, backend)
        if not bound or chunks == num_tokens:
            return _counts_of(pairs_CRE, counted, dispatcher)
        # A rank has the experts of one slice, and the tokens of its tensor parallel partners.
        received = pairs_CRE.sum(dim=1).view(chunks, dispatcher.ep_size, -1).sum(dim=2) / dispatcher.tp_size
        most = max(pairs_CRE.sum(dim=2).flatten().tolist() + received.flatten().tolist())
        if most <= bound:
            return _counts_of(pairs_CRE, counted, dispatcher)
        chunks = min(num_tokens, max(chunks + 1, math.ceil(chunks * most / bound)))


def count_known(map_TE: torch.Tensor, backend: Backend, most: int) -> list[Counts]:
    """Count without a host wait: one rank has all experts, and each token has at most `most` of them.

    Args:
        map_TE, backend: as in `count_pairs`.
        most: experts per token; a token can have fewer if one kernel computes all experts.
    """
    tokens_per_expert, counted = backend.count(map_TE)
    return [Counts(len(map_TE) * most, tokens_per_expert, None, counted)]


def read_pairs(
    map_TE: torch.Tensor, chunks: int, dispatcher: MoETokenDispatcher, backend: Backend
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Read the pairs of all ranks by chunk and expert from the device; the only host wait.

    Args:
        map_TE, dispatcher, backend: as in `count_pairs`.
        chunks: C.

    Returns:
        int64 `[C, R, E]` on the host, and the backend's own counts of each chunk.
    """
    counts, counted = zip(*(backend.count(part) for part in map_TE.tensor_split(chunks)), strict=True)
    pairs_CE = torch.stack(counts) if chunks > 1 else counts[0].unsqueeze(0)
    if dispatcher.tp_ep_group.size() > 1:
        pairs_CE = gather_from_sequence_parallel_region(pairs_CE, group=dispatcher.tp_ep_group)
    return pairs_CE.view(dispatcher.tp_ep_group.size(), chunks, -1).transpose(0, 1).cpu().long(), list(counted)


def _counts_of(pairs_CRE: torch.Tensor, counted: list[torch.Tensor], dispatcher: MoETokenDispatcher) -> list[Counts]:
    found = []
    for pairs_RE, of_backend in zip(pairs_CRE, counted, strict=True):
        # Neighboring ranks of the group are tensor parallel partners.
        sent = pairs_RE.view(dispatcher.ep_size, dispatcher.tp_size, -1).transpose(0, 1)
        own_E = sent[dispatcher.tp_rank, dispatcher.ep_rank]
        received = sent.unflatten(2, (dispatcher.ep_size, -1))[:, :, dispatcher.ep_rank]
        exchange = None
        if dispatcher.tp_ep_group.size() > 1:
            exchange = Exchange(
                sent=own_E.view(dispatcher.ep_size, -1).sum(dim=1),
                received=received[dispatcher.tp_rank].sum(dim=1),
                gathered=received.sum(dim=(1, 2)),
                per_expert=received.flatten(0, 1),
            )
        found.append(Counts(sum(own_E.tolist()), received.sum(dim=(0, 1)), exchange, of_backend))
    return found


def plan_dispatch(probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: Counts, backend: Backend) -> DispatchPlan:
    """Make the plan from gates and map, `[T, E]`, and their counts."""
    order, gates_P = backend.plan(probs_TE, map_TE, counts.counted, counts.num_pairs)
    return DispatchPlan(order, gates_P, counts)
