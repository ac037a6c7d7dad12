"""Top-k of normalized ReLU gates (NormRouter of UniPool, arXiv 2605.06665); see `routing/gate_scale.py`."""

from typing import Any

import torch
from torch.nn.functional import normalize

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.routing.gate_scale import GateScale


class NormalizedTopKRouter(TopKRouter):
    """Top-k of normalized ReLU gates, some of which can be 0, with Megatron's auxiliary loss per micro-batch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate_scale = GateScale(self.config, self.weight)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with its k largest logits."""
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.view(-1, self.num_experts), padding_mask=padding_mask_T)
        map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, logits_TE.topk(self.topk).indices, True)
        scores_TE = self.gate_scale(normalize(logits_TE, dim=-1).relu())
        if padding_mask_T is not None:
            routed_T1 = ~padding_mask_T.unsqueeze(-1)
            map_TE, scores_TE = map_TE & routed_T1, scores_TE * routed_T1
        probs_TE = torch.where(map_TE, scores_TE, 0.0)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs_TE = self._apply_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=padding_mask is not None)
        return probs_TE, map_TE
