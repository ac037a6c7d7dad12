"""Expert threshold routing (Sun et al., arXiv 2603.11535): a token goes to the experts whose threshold it exceeds.

T tokens (sequence x batch), E experts.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter

KEPT = 0.99  # share of the old thresholds in an update
UNIT = 2.0**-32


class ExpertThresholdRouter(TopKRouter):
    """Gates are sigmoids; each expert's threshold follows the logit that a share k/E of the tokens exceeds.

    The number of experts per token varies around k. Tokens do not depend on later ones: thresholds are those of earlier
    steps, except in the very first one.

    Attributes:
        thresholds: int64 `[E]`, moving averages in units of 2^-32; integers, as half-precision wrappers cast floats.
        batches: int64 scalar, number of steps that have updated the thresholds.
        quantile_sums: int64 `[E]`, sum over this step's micro-batches of the logits that thresholds follow; same units.
        micro_batches: int64 scalar, number of micro-batches in the sum; those with NaN or Inf are left out.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        device = torch.cuda.current_device()
        self.register_buffer("thresholds", torch.zeros(self.num_experts, dtype=torch.int64, device=device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("quantile_sums", torch.zeros_like(self.thresholds), persistent=False)
        self.register_buffer("micro_batches", torch.zeros_like(self.batches), persistent=False)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts whose threshold its logit exceeds; gates are the logits' sigmoids."""
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.view(-1, self.num_experts), padding_mask=padding_mask_T)
        seen_TE = logits_TE.detach().double()
        if padding_mask_T is not None:
            seen_TE = seen_TE.masked_fill(padding_mask_T.unsqueeze(-1), -torch.inf)
        thresholds_E = self.thresholds
        if self.training:
            quantiles_E = self._quantiles(seen_TE)
            is_finite = quantiles_E.isfinite().all()
            fixed_point_E = torch.where(is_finite, quantiles_E, 0.0).to(torch.int64)
            thresholds_E = torch.where(self.batches > 0, thresholds_E, fixed_point_E)
            if torch.is_grad_enabled():
                self.quantile_sums.add_(fixed_point_E)
                self.micro_batches.add_(is_finite)
        map_TE = seen_TE > thresholds_E.double() * UNIT
        return torch.where(map_TE, logits_TE.sigmoid(), 0.0), map_TE

    def end_step(self) -> None:
        """Move the thresholds. They stay fixed during a step, so that recomputation routes as the first pass did."""
        fixed_point_E = self.quantile_sums // self.micro_batches.clamp(min=1)
        before_E = torch.where(self.batches > 0, self.thresholds, fixed_point_E)
        change_E = ((1 - KEPT) * (fixed_point_E - before_E).double()).round().to(torch.int64)
        self.thresholds.copy_(before_E + change_E * (self.micro_batches > 0))
        self.batches.add_(self.micro_batches > 0)
        torch._foreach_zero_([self.quantile_sums, self.micro_batches])

    def _quantiles(self, seen_TE: torch.Tensor) -> torch.Tensor:
        """Return each expert's logit that a share k/E of tokens exceeds, averaged over ranks: fp64 `[E]` in `UNIT`s."""
        num_tokens = (seen_TE[:, :1] != -torch.inf).sum(dim=0)  # padding is -inf
        above = (num_tokens * self.topk // self.num_experts).clamp(min=1).minimum(num_tokens - 1).clamp(min=0)
        largest_TE = seen_TE.topk(min(len(seen_TE), len(seen_TE) * self.topk // self.num_experts + 2), dim=0).values
        quantiles_E = (largest_TE.index_select(0, above)[0] / UNIT).ceil()
        if self.tp_dp_cp_group.size() > 1:
            torch.distributed.all_reduce(quantiles_E, group=self.tp_dp_cp_group)
        return quantiles_E / self.tp_dp_cp_group.size()
