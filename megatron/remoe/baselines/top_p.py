"""Top-p routing at a fixed average cost (DTop-p, arXiv 2512.13996): a PI controller moves the threshold p.

    a token's experts: the fewest whose softmax probabilities add up to p, the most probable first
    error = (k - experts per token) / E,     p = k/E + PROPORTIONAL · error + INTEGRAL · Σ error

T tokens (sequence x batch), E experts.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter

PROPORTIONAL, INTEGRAL, UNIT = 0.2, 0.1, 2.0**-32


class TopPRouter(TopKRouter):
    """Take a token's most probable experts until their sum reaches p; k experts per token on average.

    Each layer has its own p, which moves after each training step. The paper shares one p among layers and normalizes
    their logits. This class does neither, and does not use the paper's gains.

    Attributes:
        errors: int64 scalar, the sum of errors in units of 2^-32; an integer, as half-precision wrappers cast floats.
        threshold: int64 scalar, p of the next step in the same units.
        seen: int64 `[2]`, pairs and tokens of this step so far.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        device = torch.cuda.current_device()
        start = round(self.topk / self.num_experts / UNIT)  # equal probabilities reach k/E with k experts
        self.register_buffer("errors", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("threshold", torch.full((), start, dtype=torch.int64, device=device))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to its most probable experts, and count them in training; gates are the softmax."""
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.view(-1, self.num_experts), padding_mask=padding_mask_T)
        scores_TE = logits_TE.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ordered_TE, experts_TE = scores_TE.detach().double().sort(dim=-1, descending=True, stable=True)
        before_TE = ordered_TE.cumsum(dim=-1) - ordered_TE
        is_needed_TE = before_TE < self.threshold.double() * UNIT
        map_TE = torch.zeros_like(is_needed_TE).scatter_(1, experts_TE, is_needed_TE)
        if padding_mask_T is not None:
            map_TE = map_TE & ~padding_mask_T.unsqueeze(-1)
        if self.training and torch.is_grad_enabled():
            self.seen[0] += map_TE.sum()
            self.seen[1] += len(map_TE) - (0 if padding_mask_T is None else padding_mask_T.sum())
        return torch.where(map_TE, scores_TE, 0.0).to(logits.dtype), map_TE

    def end_step(self) -> None:
        """Move p. It stays fixed during a step, so that recomputation routes as the first pass did."""
        seen = self.seen.double()
        self.seen.zero_()
        if self.tp_dp_cp_group.size() > 1:
            torch.distributed.all_reduce(seen, group=self.tp_dp_cp_group)
        error = (self.topk - seen[0] / seen[1].clamp(min=1.0)) / self.num_experts * (seen[1] > 0)
        start = self.topk / self.num_experts
        # Limit the sum, so that p without the proportional part stays between 0 and 1.
        total = (self.errors * UNIT + error).clamp(-start / INTEGRAL, (1.0 - start) / INTEGRAL)
        threshold = (start + PROPORTIONAL * error + INTEGRAL * total).clamp(UNIT, 1.0)
        self.errors.copy_((total / UNIT).round().to(torch.int64))
        self.threshold.copy_((threshold / UNIT).round().to(torch.int64))
