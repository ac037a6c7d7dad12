"""What routers without weights have in common."""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter


class UnlearnedRouter(TopKRouter):
    """Routes each token to `moe_router_topk` different experts, which add up with gates of 1; nothing is learned."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Megatron waits for the gradient of every parameter that is there.
        self.weight = self.bias = None

    def draw(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[sequence, batch, hidden]` → numbers `[num_tokens, num_experts]`, of which the largest k are taken."""
        raise NotImplementedError

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None, *_of_topk: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the tokens, padding included, as Megatron's top-k router does.

        Args:
            input: `[sequence, batch, hidden]`.
            padding_mask: not looked at.
            _of_topk: what only other ways of routing go by, in versions of Megatron that have them.

        Returns:
            probs: `[num_tokens, num_experts]` of the input's dtype, 1 where the map is True.
            routing_map: bool, of that shape.
        """
        drawn = self.draw(input)
        chosen = drawn.topk(self.topk, dim=1).indices
        routing_map = torch.zeros_like(drawn, dtype=torch.bool).scatter_(1, chosen, True)
        return routing_map.to(input.dtype), routing_map
