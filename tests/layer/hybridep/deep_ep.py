"""Replace HybridEP's kernels by PyTorch's collectives, in the part of the package `deep_ep` that Megatron calls.

As a program, this file is the training entry with these stand-ins.

As in DeepEP's branch `hybrid-ep` (`deep_ep/hybrid_ep_buffer.py`, `csrc/hybrid_ep`), the map can send a token to any
number of experts. Rows are sorted by expert, then by token. `combine_with_unpermute` sums over all ranks; the sum of a
token without experts is 0.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

Handle = tuple[torch.Tensor, torch.Tensor, int]  # each row's local expert and token (of all ranks), own tokens


def megatrons_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that Megatron's dispatchers have if `deep_ep` is installed."""
    from megatron.core.transformer.moe import fused_a2a

    spec = importlib.util.spec_from_file_location("fused_a2a_with_deep_ep", fused_a2a.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: getattr(module, name) for name in ("hybrid_ep_dispatch", "hybrid_ep_combine")}


class HybridEPBuffer:
    """Dispatch and combine over one group; all ranks have the same number of tokens and experts."""

    def __init__(self, group: distributed.ProcessGroup, num_local_experts: int, **_sizes: Any) -> None:
        self.group, self.experts = group, num_local_experts
        self.first = group.rank() * num_local_experts

    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        handle: Handle | None = None,
        **_tuning: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None, torch.Tensor, Handle]:
        """Return the rows for this rank's experts, their gates, None, each expert's number of rows, and the handle."""
        if handle is None:
            assert routing_map is not None and routing_map.dtype == torch.bool
            mine = self._gathered(routing_map)[:, self.first : self.first + self.experts]
            expert, token = mine.T.nonzero(as_tuple=True)
            handle = expert, token, len(hidden)
        expert, token, _ = handle
        gates = None if probs is None else self._gathered(probs)[token, self.first + expert]
        counts = torch.bincount(expert, minlength=self.experts)
        return self._gathered(hidden)[token], gates, None, counts, handle

    def combine_with_unpermute(
        self, *, hidden: torch.Tensor, handle: Handle, probs: torch.Tensor | None = None, **_tuning: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return each of this rank's tokens, summed over all ranks' rows, and the gates in the map's shape."""
        expert, token, num_tokens = handle
        ranks = self.group.size()
        sums = hidden.new_zeros(ranks * num_tokens, hidden.shape[1]).index_add_(0, token, hidden)
        if probs is None:
            return self._scattered(sums), None
        gates = probs.new_zeros(ranks * num_tokens, ranks * self.experts)
        gates[token, self.first + expert] = probs
        return self._scattered(sums), self._scattered(gates)

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.group.size())]
        distributed.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts)

    def _scattered(self, sums: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(sums, group=self.group)
        return sums.chunk(self.group.size())[self.group.rank()]


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    from megatron.remoe import pretrain

    def use_stand_in(_model_cfg: Any) -> None:
        from megatron.core.transformer.moe import token_dispatcher

        sys.modules["deep_ep"] = sys.modules["__main__"]
        vars(token_dispatcher).update(megatrons_functions())

    pretrain.main(use_stand_in)
