"""The ReLU router (paper section 3.1). What it computes from its logits is in `kernels/pytorch.py`: `relu_routing`.

T tokens (sequence x batch), E experts.
"""

from statistics import NormalDist
from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.kernels.backend import Regularization, backend_of
from megatron.remoe.kernels.pytorch import active, l1_coefficient
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.counts import RoutingCounts

GUARD_COEFFICIENT = 0.1


class ReLURouter(TopKRouter):
    """`R(x) = ReLU(x W)`: an expert is active for a token where its gate is positive, and the gate is its weight.

    In training the gates carry the gradient of λ · L_reg, which holds the sparsity at its target. Gating, input jitter,
    `moe_router_dtype` and z-loss are those of Megatron's router; only `routing` differs.

    Attributes:
        l1_exponent: int64 scalar n of λ = init · multiplier^n. Half-precision wrappers cast floating-point buffers and
            leave integers, so λ stays exact; it is saved with the model.
        guarded: int64 scalar, 1 where the layer was all but off in the last optimizer step and is to be revived.
        reached: int64 scalar, 1 once S has reached its target. None unless `moe_relu_l1_reg_start_power` is above 1.
        counts: what the router saw since the last optimizer step, on the device. None before the first counted
            forward pass.

    Raises:
        ValueError: `config` does not ask for ReLU routing, so that nothing was refused that assumes top-k.
    """

    config: ReMoEConfig
    bias: torch.nn.Parameter | None

    def __init__(self, config: ReMoEConfig, *arguments: Any, **options: Any) -> None:
        if not getattr(config, "moe_relu_routing", False):
            raise ValueError(f"ReLURouter needs a ReMoEConfig with moe_relu_routing=True, got {type(config).__name__}.")
        super().__init__(config, *arguments, **options)
        if not config.moe_relu_router_bias:
            self.bias = None
        if config.moe_relu_sparse_start:
            self._start_sparse()
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        self.register_buffer("l1_exponent", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("guarded", torch.zeros((), dtype=torch.int64, device=device))
        has_start = config.moe_relu_l1_reg_start_power > 1
        self.register_buffer("reached", torch.zeros((), dtype=torch.int64, device=device) if has_start else None)
        self.counts: RoutingCounts | None = None
        self.backend = backend_of(config)
        self.regularization = Regularization(
            topk=config.moe_router_topk,
            init=config.moe_relu_l1_reg_coeff_init,
            multiplier=config.moe_relu_l1_reg_coeff_multiplier,
            guard=GUARD_COEFFICIENT,
            balances=config.moe_relu_l1_reg_load_balancing,
        )

    def _start_sparse(self) -> None:
        """Add a bias with which a share k/E of the tokens goes to each expert before the first step.

        Behind a norm a token has the length √H, so that its product with the weights w of an expert has the standard
        deviation |w| over directions. The bias is that distribution's quantile: -|w| · Φ⁻¹(1 - k/E).
        """
        quantile = NormalDist().inv_cdf(self.config.target_sparsity)
        bias = torch.nn.Parameter((-quantile * self.weight.detach().float().norm(dim=1)).to(self.weight.dtype))
        bias.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        self.bias = bias

    @property
    def l1_coefficient(self) -> torch.Tensor:
        """λ as a float64 scalar on the device."""
        return l1_coefficient(self.regularization, self.l1_exponent)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with a positive logit.

        Args:
            logits: `[sequence, batch, E]`, in the router's dtype.
            padding_mask: bool `[sequence, batch]`, True at padding, which is neither routed nor counted.
            _unused: arguments of other ways of routing, in versions of Megatron that have them.

        Returns:
            probs: `[T, E]`, the gates ReLU(logits), with the L1 term attached to their gradient in training.
            routing_map: bool `[T, E]`, True where the gate is positive. With `moe_relu_max_experts` both keep the
                largest gates of each token.
        """
        logits_TE = logits.view(-1, self.num_experts)
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_mask_T)

        # Recomputation runs the forward pass twice, once of them without gradients; evaluation has none at all.
        if not (self.training and torch.is_grad_enabled()):
            map_TE = active(logits_TE, padding_mask_T)
            return self._largest(torch.where(map_TE, logits_TE, 0.0), map_TE)
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
        probs_TE, computed_TE = self._largest(probs_TE, map_TE)
        if computed_TE is not map_TE:
            self.counts["left_out"].add_((map_TE & ~computed_TE).sum())
        return probs_TE, computed_TE

    def _largest(self, probs_TE: torch.Tensor, map_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gates and map of the K largest gates of each token; without `moe_relu_max_experts` the same two.

        The gates that are left out keep the gradient of λ · L_reg, which they have from before.
        """
        most = self.config.moe_relu_max_experts
        if most is None:
            return probs_TE, map_TE
        largest = torch.zeros_like(map_TE).scatter_(1, probs_TE.detach().topk(most, dim=1).indices, True)
        computed_TE = map_TE & largest
        return torch.where(computed_TE, probs_TE, 0.0), computed_TE
