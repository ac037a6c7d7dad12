"""The ReLU router and its load-balanced L1 regularization (paper sections 3.2 to 3.4)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.kernels import wants_kernels
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.counts import RoutingCounts

GUARD_COEFFICIENT = 0.1


class GuardedReLU(torch.autograd.Function):
    """ReLU whose gradient is `push` instead of 0 where it is off."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, active: torch.Tensor, push: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: `[num_tokens, num_experts]`.
            active: bool, of that shape: where the result is not 0.
            push: one element, the gradient elsewhere, as that of a loss term; 0 makes it an ordinary ReLU.
        """
        ctx.save_for_backward(active, push)
        return torch.where(active, logits, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the logits."""
        active, push = ctx.saved_tensors
        push = push * MoEAuxLossAutoScaler.main_loss_backward_scale  # set by Megatron between forward and backward
        return torch.where(active, gradient, push.to(gradient.dtype)), None, None


class ReLURouter(TopKRouter):
    """`R(x) = ReLU(x W)`: an expert is active for a token exactly where its gate is positive.

    Gating, input jitter, `moe_router_dtype` and z-loss are those of Megatron's router; only `routing` differs.

    Attributes:
        l1_exponent: int64 scalar n of the coefficient λ = init · multiplier^n. Half-precision wrappers cast
            floating-point buffers and leave integers, so λ stays exact; it is saved with the model.
        guarded: int64 scalar, 1 where the layer was all but off in the last optimizer step and is to be revived.
        counts: what the router saw since the last optimizer step, on the device. None before the first counted
            forward pass.

    Raises:
        ValueError: `config` does not ask for ReLU routing, so that nothing was refused that assumes top-k.
    """

    config: ReMoEConfig

    def __init__(self, config: ReMoEConfig, *arguments: Any, **options: Any) -> None:
        if not getattr(config, "moe_relu_routing", False):
            raise ValueError(f"ReLURouter needs a ReMoEConfig with moe_relu_routing=True, got {type(config).__name__}.")
        super().__init__(config, *arguments, **options)
        if not config.moe_relu_router_bias:
            self.bias = None
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        self.register_buffer("l1_exponent", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("guarded", torch.zeros((), dtype=torch.int64, device=device))
        self.counts: RoutingCounts | None = None
        self._kernels = _kernels_of(config) if wants_kernels(config) else None

    @property
    def l1_coefficient(self) -> torch.Tensor:
        """λ as a float64 scalar on the device."""
        multiplier = torch.full_like(
            self.l1_exponent, self.config.moe_relu_l1_reg_coeff_multiplier, dtype=torch.float64
        )
        return self.config.moe_relu_l1_reg_coeff_init * multiplier**self.l1_exponent

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_of_topk: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with a positive logit.

        Args:
            logits: `[sequence, batch, num_experts]`, in the router's dtype.
            padding_mask: bool `[sequence, batch]`, True at padding, which is neither routed nor counted.
            _of_topk: what only other ways of routing go by, in versions of Megatron that have them.

        Returns:
            probs: `[num_tokens, num_experts]`, the gates ReLU(logits), with the L1 term attached to their gradient
                in training.
            routing_map: bool `[num_tokens, num_experts]`, True where the gate is positive.
        """
        logits = logits.view(-1, self.num_experts)
        if padding_mask is not None:
            padding_mask = padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)

        # Recomputation runs the forward pass twice, once of them without gradients; evaluation has none at all.
        if not (self.training and torch.is_grad_enabled()):
            routing_map = _active(logits, padding_mask)
            return torch.where(routing_map, logits, 0.0), routing_map
        if self.counts is None:
            self.counts = RoutingCounts.zeros(self.num_experts, logits.device)
        if self._kernels is not None:
            buffers = self.l1_exponent, self.guarded, self.counts.table
            return self._kernels(logits, padding_mask, *buffers, self.tp_cp_group, self.calculate_per_token_loss)
        return self._regularized(logits, padding_mask, self.counts)

    def _regularized(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None, counts: RoutingCounts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates, with λ · L_reg and the guard against dying layers in their gradient, and map. Counts them."""
        routing_map = _active(logits, padding_mask)
        if padding_mask is None:
            num_tokens = routing_map.new_full((1,), routing_map.shape[0], dtype=torch.int64)
        else:
            num_tokens = (~padding_mask).sum(dim=0, keepdim=True)
        local_counts = torch.cat([routing_map.sum(dim=0), num_tokens])
        # The tokens of one sequence may be split over tensor (sequence) and context parallel ranks.
        sequence_counts = local_counts
        if self.tp_cp_group.size() > 1:
            sequence_counts = reduce_from_tensor_model_parallel_region(local_counts.clone(), self.tp_cp_group)
        tokens_per_expert, sequence_tokens = sequence_counts[:-1], sequence_counts[-1].clamp(min=1)
        # A router that is off for every token has no gradient, neither of the language loss nor of L1, and stays off.
        push = 0.0 - GUARD_COEFFICIENT * self.guarded / (sequence_tokens * self.num_experts)
        weight = self.l1_coefficient * (1 - self.guarded)
        if self.calculate_per_token_loss:
            # What finalize_model_grads divides every gradient by: the number of tokens of the global batch.
            scale = num_tokens[0] * self.tp_cp_group.size()
            push, weight = push * scale, weight * scale
        probs = GuardedReLU.apply(logits, routing_map, push)

        if self.config.moe_relu_l1_reg_load_balancing:
            l1_loss = switch_load_balancing_loss_func(
                probs=probs.float(),
                tokens_per_expert=tokens_per_expert,
                total_num_tokens=sequence_tokens,
                topk=self.topk,
                num_experts=self.num_experts,
                moe_aux_loss_coeff=1.0,
            )
        else:
            l1_loss = probs.float().sum() / sequence_tokens
        counts.add(local_counts, l1_loss, 1.0 / self.tp_cp_group.size())
        return MoEAuxLossAutoScaler.apply(probs, weight * l1_loss), routing_map


def _active(logits: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    routing_map = logits > 0
    return routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)


def _kernels_of(config: ReMoEConfig) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    from megatron.remoe.kernels.router import Regularization, relu_routing

    regularization = Regularization(
        topk=config.moe_router_topk,
        init=config.moe_relu_l1_reg_coeff_init,
        multiplier=config.moe_relu_l1_reg_coeff_multiplier,
        guard=GUARD_COEFFICIENT,
        balances=config.moe_relu_l1_reg_load_balancing,
    )
    return partial(relu_routing, regularization)
