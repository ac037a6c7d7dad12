"""The router of DECO (arXiv 2605.10933): entropy in place of L1, and a learned scale for each expert.

    g   = ReLU(x W),   p = g / Σ_e g_e         the gates, and their shares
    y   = Σ_e s_e · g_e · FFN_e(x)             s_e is learned and starts at 0.1
    L   = L_lm - λ · Σ_layers 1/T · Σ_t Σ_e p_te log p_te

λ moves as in ReLU routing. DECO's code divides the entropy by the number of layers and keeps λ at λ₀ or above; this
does neither. DECO's shared expert and its experts without gates are not part of the router.
"""

from typing import Any

import torch

from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.remoe.routing.router import ReLURouter

START, SMALL = 0.1, 1e-5


class DecoRouter(ReLURouter):
    """ReLU routing whose sparsity comes from the entropy of a token's gates; the load is not balanced.

    Attributes:
        scale: `[E]`, s.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.scale = torch.nn.Parameter(torch.full_like(self.weight[:, 0], START))
        self.scale.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with a positive logit; the gates are s · ReLU(x W)."""
        if self.training and torch.is_grad_enabled():
            logits = MoEAuxLossAutoScaler.apply(logits, self._entropy_loss(logits, padding_mask))
        gates_TE, map_TE = super().routing(logits, padding_mask)
        return gates_TE * self.scale.to(gates_TE.dtype), map_TE

    def l1_gradients(self, f_E: torch.Tensor, num_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the guard's gradient, but drop that of L1, which is only logged."""
        d_l1_E, d_guard = super().l1_gradients(f_E, num_tokens)
        return torch.zeros_like(d_l1_E), d_guard

    def _entropy_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Return λ times this rank's part of the mean entropy, or of its sum with losses per token; 0 if guarded."""
        gates = logits.to(torch.promote_types(logits.dtype, torch.float32)).relu()
        shares = gates / (gates.sum(dim=-1, keepdim=True) + SMALL)
        entropies = -(shares * (shares + SMALL).log()).sum(dim=-1)
        is_token = torch.ones_like(entropies) if padding_mask is None else ~padding_mask
        loss = (entropies * is_token).sum() * (self.l1_coefficient() * (1 - self.guarded)).to(gates.dtype)
        if self.calculate_per_token_loss:  # finalize_model_grads divides by the tokens of the global batch
            return loss
        return loss / reduce_from_tensor_model_parallel_region(is_token.sum(), self.tp_cp_group).clamp(min=1)
