"""The ReLU router (paper section 3.1). Its gates, L1 term and counts are `relu_routing` in `kernels/pytorch.py`.

    R(x) = ReLU(x W)                 an expert is active for a token where its gate is positive
    y    = Σ_e R(x)_e · FFN_e(x)     the layer's output: a gate is also the weight of its expert

T tokens (sequence x batch), E experts.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.kernels.backend import Regularization, backend_of
from megatron.remoe.kernels.pytorch import active
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.counts import RoutingCounts

GUARD_COEFFICIENT = 0.1


class ReLURouter(TopKRouter):
    """Megatron's router with ReLU in place of softmax and top-k; the number of experts per token varies from 0 to E.

    In training the gates carry the gradient of λ · L_reg, which holds the sparsity at its target. Gating, input jitter,
    `moe_router_dtype` and z-loss stay Megatron's.

    Attributes:
        l1_exponent: int64 scalar n of λ = init · multiplier^n, saved with the model. Half-precision wrappers cast
            floating-point buffers and leave integers, so λ stays exact.
        guarded: int64 scalar, 1 if the layer was almost off in the last optimizer step and is pushed up in this one.
        counts: what the router saw since the last optimizer step, on the device. None before the first counted
            forward pass.

    Raises:
        ValueError: `config` does not ask for ReLU routing, so settings that assume top-k were not refused.
    """

    config: ReMoEConfig

    def __init__(self, config: ReMoEConfig, *arguments: Any, **options: Any) -> None:
        if not getattr(config, "moe_relu_routing", False):
            raise ValueError(f"ReLURouter needs a ReMoEConfig with moe_relu_routing=True, got {type(config).__name__}.")
        super().__init__(config, *arguments, **options)
        self.bias = None  # Megatron's router has one if other linear layers have
        device = torch.cuda.current_device()
        for name in ("l1_exponent", "guarded"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self.counts: RoutingCounts | None = None
        self.backend = backend_of(config)
        self.regularization = Regularization(
            topk=config.moe_router_topk,
            init=config.moe_relu_l1_reg_coeff_init,
            multiplier=config.moe_relu_l1_reg_coeff_multiplier,
            guard=GUARD_COEFFICIENT,
            balances=config.moe_relu_l1_reg_load_balancing,
        )

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with a positive logit.

        Args:
            logits: `[sequence, batch, E]`, x W in the router's dtype.
            padding_mask: bool `[sequence, batch]`, True at padding, which is neither routed nor counted.
            _unused: arguments of other routings in some versions of Megatron.

        Returns:
            probs: `[T, E]`, the gates ReLU(logits), with the gradient of λ · L_reg in training.
            routing_map: bool `[T, E]`, True where the gate is positive. With `moe_relu_max_experts` both keep only the
                largest gates of each token.
        """
        logits_TE = logits.view(-1, self.num_experts)
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_mask_T)

        # Count once: recomputation runs the forward pass twice, the first time without gradients.
        if not (self.training and torch.is_grad_enabled()):
            map_TE = active(logits_TE, padding_mask_T)
            return self._keep_largest(torch.where(map_TE, logits_TE, 0.0), map_TE)
        if self.counts is None:
            self.counts = RoutingCounts.zeros(self.num_experts, logits.device)
        probs_TE, map_TE = self.backend.relu_routing(
            self.regularization,
            logits_TE,
            padding_mask_T,
            self.l1_exponent,
            self.guarded,
            self.counts.table,
            self.tp_cp_group,
            self.calculate_per_token_loss,
        )
        probs_TE, computed_TE = self._keep_largest(probs_TE, map_TE)
        if computed_TE is not map_TE:
            self.counts["left_out"].add_((map_TE & ~computed_TE).sum())
        return probs_TE, computed_TE

    def _keep_largest(self, probs_TE: torch.Tensor, map_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gates and map of each token's `moe_relu_max_experts` largest gates; without it, all of them.

        Gates that are left out still have the gradient of λ · L_reg.
        """
        most = self.config.moe_relu_max_experts
        if most is None:
            return probs_TE, map_TE
        largest = torch.zeros_like(map_TE).scatter_(1, probs_TE.detach().topk(most, dim=1).indices, True)
        computed_TE = map_TE & largest
        return torch.where(computed_TE, probs_TE, 0.0), computed_TE
