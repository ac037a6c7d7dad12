"""Stand in for DeepEP's kernels with PyTorch's collectives: the part of the package `deep_ep` that Megatron calls.

A token goes once to each rank that has one of its experts. There its slots hold the rank's experts, or -1 for others.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

from deep_ep.utils import EventOverlap

Handle = tuple[torch.Tensor, torch.Tensor, int]  # token of each row, which slots are here, tokens of this rank


class Buffer:
    """Dispatch and combine over one group; all ranks have the same number of tokens and experts."""

    def __init__(self, group: distributed.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(_number: int) -> None:
        """Do nothing."""

    @staticmethod
    def get_dispatch_config(_ranks: int) -> SimpleNamespace:
        """Return size hints of 0, because no buffers are needed."""
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda *_: 0, get_rdma_buffer_size_hint=lambda *_: 0)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        """Count the pairs that each expert gets from this rank; the other results are placeholders."""
        assert topk_idx.dtype == torch.int64 and topk_idx.shape[1] <= 32
        return None, None, torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts), None, EventOverlap()

    def dispatch(
        self,
        x: torch.Tensor,
        handle: Handle | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """Return the rows for this rank, their slots and gates, and the number of pairs of each expert."""
        if handle is not None:
            return self._gathered(x)[handle[0]], None, None, None, None, EventOverlap()
        assert topk_idx is not None and topk_weights is not None and num_tokens_per_expert is not None
        experts = len(num_tokens_per_expert) // self.group.size()
        local = self._gathered(topk_idx) - self.group.rank() * experts
        here = (local >= 0) & (local < experts) & (self._gathered(topk_idx) >= 0)
        token = here.any(dim=1).nonzero()[:, 0]
        slots = local.masked_fill(~here, -1)[token]
        gates = (self._gathered(topk_weights) * here)[token]
        counts = torch.bincount(slots[slots >= 0], minlength=experts).tolist()
        return self._gathered(x)[token], slots, gates, counts, (token, here[token], len(x)), EventOverlap()

    def combine(
        self, x: torch.Tensor, handle: Handle, topk_weights: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Return the sums of each token of this rank over all ranks: of its rows, and of its gates by slot."""
        token, here, tokens = handle
        gates = None if topk_weights is None else self._sums(topk_weights * here, token, tokens)
        return self._sums(x, token, tokens), gates, EventOverlap()

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.group.size())]
        distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts)

    def _sums(self, rows: torch.Tensor, token: torch.Tensor, tokens: int) -> torch.Tensor:
        sums = rows.new_zeros(self.group.size() * tokens, rows.shape[1]).index_add_(0, token, rows)
        distributed.all_reduce(sums, group=self.group)
        return sums.chunk(self.group.size())[self.group.rank()]
