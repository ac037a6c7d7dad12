"""Null experts (AdaMoE, arXiv 2406.13233; LongCat's zero-computation experts): some of a token's choices cost nothing.

    p = softmax(x W) over E experts and as many null ones; a token's choices: the 2k largest
    gate of a chosen expert: p_i / Σ p_j over the token's chosen experts, null ones left out
    auxiliary loss = α · 2E · Σ f_i P_i over all 2E; f_i: share of the choices, for null experts their average

T tokens (sequence x batch), E experts.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter


class NullExpertRouter(TopKRouter):
    """Takes a token's 2k largest of 2E outputs; the half that is null experts leaves k experts per token on average.

    The auxiliary loss (`moe_aux_loss_coeff`) keeps that average: without it the number of experts drifts. A token can
    end up without any expert. With k = 1 most gates are 1 and have no gradient.

    Attributes:
        weight: `[2E, hidden]`, the experts' rows first.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        rows = 2 * self.num_experts
        self.weight = torch.nn.Parameter(torch.empty(rows, self.config.hidden_size, dtype=torch.float32))
        if self.config.add_bias_linear:
            self.bias = torch.nn.Parameter(torch.empty(rows, dtype=torch.float32))
        self.reset_parameters()

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts among its choices; its gates add up to 1 where it has an expert.

        Logits are `[sequence, batch, 2E]`.
        """
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TN = self.apply_z_loss(logits.view(-1, 2 * self.num_experts), padding_mask=padding_T)
        scores_TN = logits_TN.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        chosen = scores_TN.detach().topk(2 * self.topk, dim=1).indices
        chosen_TN = torch.zeros_like(scores_TN, dtype=torch.bool).scatter_(1, chosen, True)
        if padding_T is not None:
            chosen_TN = chosen_TN & ~padding_T.unsqueeze(-1)
        map_TE, null_TE = chosen_TN.chunk(2, dim=1)
        taken_TE = torch.where(map_TE, scores_TN[:, : self.num_experts], 0.0)
        probs_TE = taken_TE / torch.where(map_TE.any(dim=1), taken_TE.sum(dim=1), 1.0).unsqueeze(-1)
        if self.training and torch.is_grad_enabled():
            # Only sums over tokens count, so null experts are averaged here; Megatron's factor E/k equals 2E/2k.
            averaged_TE = null_TE.float().mean(dim=1, keepdim=True).expand_as(null_TE)
            seen_TN = scores_TN if padding_T is None else scores_TN * ~padding_T.unsqueeze(-1)
            probs_TE = self._apply_aux_loss(probs_TE, seen_TN, torch.cat([map_TE.float(), averaged_TE], dim=1))
        return probs_TE.to(logits.dtype), map_TE
