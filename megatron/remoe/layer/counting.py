"""Count the pairs that ranks send each other, once per layer and step, for dispatch, experts and combine.

T tokens on this rank, E experts in all, L of them on this rank, B blocks of tokens, P pairs (of a token here and an
expert that is active for it), C chunks of tokens, R ranks that exchange tokens.
"""

import math
from dataclasses import dataclass

import torch

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.remoe.kernels.interface import Backend


@dataclass(frozen=True)
class ChunkCounts:
    """The numbers of pairs in a layer's tokens or in one chunk. Tensors are int64 on the host, except `counts_EB`.

    Attributes:
        num_pairs: P.
        tokens_per_expert: `[L]`, pairs that arrive at each expert here.
        sent: `[ep]`, pairs that this rank sends to each slice of experts.
        received: `[ep]`, pairs that this rank receives, by sending rank.
        gathered: `[tp]`, pairs that each tensor parallel partner (a rank with the same experts) has received in all.
        per_rank: `[R, L]`, pairs from each rank's tokens for each expert here.
        counts_EB: integers `[E, B]` on the device, the counts of this rank's tokens, for the backend's `plan`.
    """

    num_pairs: int
    tokens_per_expert: torch.Tensor
    sent: torch.Tensor
    received: torch.Tensor
    gathered: torch.Tensor
    per_rank: torch.Tensor
    counts_EB: torch.Tensor


def count_pairs(
    map_TE: torch.Tensor,
    counts_EB: torch.Tensor | None,
    dispatcher: MoETokenDispatcher,
    backend: Backend,
    limit: float = 0.0,
) -> list[ChunkCounts]:
    """Count the tokens that each rank sends to each expert, in enough chunks that no rank exceeds `limit`.

    Waits for the device once for each number of chunks that it tries.

    Args:
        map_TE: bool `[T, E]`.
        counts_EB: integers `[E, B]`, the counts of the map, if the router has computed them.
        dispatcher: the layer's dispatcher; all ranks of its `tp_ep_group` must call this function.
        backend: counts the pairs.
        limit: maximum number of pairs per token that a rank sends or receives at once; 0 for none. If T differs between
            ranks, the largest T is used, so that all ranks run the same number of chunks.

    Returns:
        The `ChunkCounts` of each chunk. Chunks are cut as `tensor_split` does.
    """
    num_chunks, parts = 1, [backend.count(map_TE) if counts_EB is None else counts_EB]
    while True:
        pairs_CRE, num_tokens = read_pairs(map_TE, parts, dispatcher)
        max_pairs = limit * num_tokens
        if not max_pairs or num_chunks == num_tokens:
            break
        sent = pairs_CRE.sum(dim=2)  # [C, R]
        # [C, ep]: a rank has the experts of one slice, and the tokens of its tensor parallel partners.
        received = pairs_CRE.sum(dim=1).view(num_chunks, dispatcher.ep_size, -1).sum(dim=2) / dispatcher.tp_size
        largest = max(sent.flatten().tolist() + received.flatten().tolist())
        if largest <= max_pairs:
            break
        num_chunks = min(num_tokens, max(num_chunks + 1, math.ceil(num_chunks * largest / max_pairs)))
        parts = [backend.count(part) for part in map_TE.tensor_split(num_chunks)]
    return [_chunk_counts(pairs_RE, part, dispatcher) for pairs_RE, part in zip(pairs_CRE, parts, strict=True)]


def read_pairs(
    map_TE: torch.Tensor, parts: list[torch.Tensor], dispatcher: MoETokenDispatcher
) -> tuple[torch.Tensor, int]:
    """Copy the pair counts of all ranks, chunks and experts from the device; the only host wait.

    Args:
        map_TE, dispatcher: as in `count_pairs`.
        parts: for each chunk, its counts, integers `[E, B]`.

    Returns:
        int64 `[C, R, E]` on the host, and the largest T of the ranks.
    """
    pairs_CE = torch.stack([part.sum(dim=1) for part in parts])
    if (ranks := dispatcher.tp_ep_group.size()) == 1:
        return pairs_CE.unsqueeze(1).cpu().long(), len(map_TE)
    pairs_CE = torch.nn.functional.pad(pairs_CE, (0, 1), value=len(map_TE))  # the last column is T
    gathered = gather_from_sequence_parallel_region(pairs_CE, group=dispatcher.tp_ep_group)
    table = gathered.view(ranks, len(parts), -1).transpose(0, 1).cpu().long()
    return table[..., :-1], int(table[..., -1].max())


def _chunk_counts(pairs_RE: torch.Tensor, counts_EB: torch.Tensor, dispatcher: MoETokenDispatcher) -> ChunkCounts:
    """Derive a chunk's counts from the pairs of all ranks, int64 `[R, E]` on the host."""
    # Neighboring ranks of the group are tensor parallel partners.
    sent = pairs_RE.view(dispatcher.ep_size, dispatcher.tp_size, -1).transpose(0, 1)  # [tp, ep, E], by sending rank
    received = sent.unflatten(2, (dispatcher.ep_size, -1))[:, :, dispatcher.ep_rank]  # [tp, ep, L], for experts here
    sent_E = sent[dispatcher.tp_rank, dispatcher.ep_rank]
    return ChunkCounts(
        num_pairs=sum(sent_E.tolist()),
        tokens_per_expert=received.sum(dim=(0, 1)),
        sent=sent_E.view(dispatcher.ep_size, -1).sum(dim=1),
        received=received[dispatcher.tp_rank].sum(dim=1),
        gathered=received.sum(dim=(1, 2)),
        per_rank=received.flatten(0, 1),
        counts_EB=counts_EB,
    )
