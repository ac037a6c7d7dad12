"""Normalized ReLU gates (NormRouter of UniPool, arXiv 2605.06665), which do not depend on the size of the logits.

    g = s · c · ReLU(l / ‖l‖)       s is learned and starts at 1
    c = 1 / √(mean of the sum of the k largest squares of ReLU(l / ‖l‖))     for normally distributed logits l

The paper averages the inverse roots instead. That mean is infinite if a token can have no positive logit.
"""

from typing import Any

import torch
from torch.nn.functional import normalize

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.routing.router import ReLURouter


class ScaledRouter(TopKRouter):
    """Multiply gates by s, the parameter `scale` `[1]`, and c, the number `start`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scale = torch.nn.Parameter(torch.ones_like(self.weight[0, :1]))
        self.scale.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        logits = torch.randn(10_000, self.num_experts, generator=torch.Generator().manual_seed(1))
        largest = normalize(logits, dim=-1).relu().topk(self.topk, dim=-1).values
        self.start = float(largest.square().sum(dim=-1).mean().rsqrt())

    def scaled(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the scaled gates, in their dtype."""
        return gates * (self.scale * self.start).to(gates.dtype)


class NormalizedReLURouter(ScaledRouter, ReLURouter):
    """ReLU routing of normalized logits; L1 uses the gates before they are scaled."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the normalized logits as `ReLURouter` does, then scale the gates."""
        gates_TE, map_TE = super().routing(logits, padding_mask)
        return self.scaled(gates_TE), map_TE

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the z-loss to the raw logits, and return the logits normalized."""
        return normalize(super().apply_z_loss(logits, padding_mask), dim=-1)


class NormalizedTopKRouter(ScaledRouter):
    """Top-k of normalized ReLU gates, some of which can be 0, with Megatron's auxiliary loss per micro-batch."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with its k largest logits."""
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.view(-1, self.num_experts), padding_mask=padding_mask_T)
        map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, logits_TE.topk(self.topk).indices, True)
        scores_TE = self.scaled(normalize(logits_TE, dim=-1).relu())
        if padding_mask_T is not None:
            routed_T1 = ~padding_mask_T.unsqueeze(-1)
            map_TE, scores_TE = map_TE & routed_T1, scores_TE * routed_T1
        probs_TE = torch.where(map_TE, scores_TE, 0.0)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs_TE = self._apply_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=padding_mask is not None)
        return probs_TE, map_TE
