"""The base class of routers without weights.

T tokens (sequence x batch), E experts.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter


class UnlearnedRouter(TopKRouter):
    """Routes each token to `moe_router_topk` different experts with gates of 1; nothing is learned."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Megatron waits for the gradient of every parameter.
        self.weight = self.bias = None

    def draw(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return a score for each token and expert; the k largest are taken: `[sequence, batch, hidden]` → `[T, E]`."""
        raise NotImplementedError

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None, *_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the tokens, padding included, as Megatron's top-k router does; gates are 1."""
        drawn = self.draw(input)
        chosen = drawn.topk(self.topk, dim=1).indices
        routing_map = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, chosen, True)
        return routing_map.to(input.dtype), routing_map
