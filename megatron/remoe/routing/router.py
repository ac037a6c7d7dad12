"""The ReLU router and its L1 term (paper sections 3.1 to 3.4).

    R(x)  = ReLU(x W)                        the gates; expert e is active for token t where R(x_t)_e > 0
    y     = Σ_e R(x)_e · FFN_e(x)            the layer's output: a gate is also the weight of its expert
    L     = L_lm + λ · Σ_layers L_reg        λ comes from `controller.py`
    L_reg = 1/T · Σ_t Σ_e f_e · R(x_t)_e     equation 9, where f_e = 1, with the load balancing of section 3.4:
    f_e   = E / (k T) · Σ_t 1[R(x_t)_e > 0]

The paper also divides L_reg by the number of layers; its code does not, and λ adapts to either.

With `moe_relu_normalize`, R(x) = ReLU(x W / ‖x W‖), and the layer's gates are s · c · R(x) (`gate_scale.py`).

T tokens (sequence x batch), E experts, B blocks of tokens that a backend counts separately (PyTorch: 1).
"""

from typing import Any

import torch
from torch.nn.functional import normalize

from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.kernels.backend import choose_backend
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.counts import RoutingCounts
from megatron.remoe.routing.gate_scale import GateScale

GUARD_COEFFICIENT = 0.1
RELU_KEY = "relu_router_key"  # in a checkpoint's metadata: the router's weight is stored as `relu_weight`


class ReLURouter(TopKRouter):
    """Megatron's router with ReLU in place of softmax and top-k; the number of experts per token varies from 0 to E.

    In training the gates carry the gradient of λ · L_reg, which holds the sparsity at its target. Gating, input jitter,
    `moe_router_dtype` and z-loss stay Megatron's.

    Attributes:
        l1_exponent: int64 scalar n of λ = λ₀ · αⁿ, saved with the model. Half-precision wrappers cast
            floating-point buffers and leave integers, so λ stays exact.
        gate_scale: multiplies normalized gates; None without `moe_relu_normalize`.
        guarded: int64 scalar, 1 if the layer was almost off in the last optimizer step and is pushed up in this one.
        counts: sums since the last optimizer step, on the device.
        last_counts_EB: integers `[E, B]`, the pairs in the last returned routing map, for the layer. Always None with
            `moe_relu_max_experts`, which can change the map.

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
        self.gate_scale = GateScale(config, self.weight) if config.moe_relu_normalize else None
        self.counts = RoutingCounts.zeros(self.num_experts, self.l1_exponent.device)
        self.last_counts_EB: torch.Tensor | None = None
        self.backend = choose_backend(config)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts with a positive logit.

        Args:
            logits: `[sequence, batch, E]`, x W in the router's dtype.
            padding_mask: bool `[sequence, batch]`, True at padding, which is neither routed nor counted.

        Returns:
            probs: `[T, E]`, the gates, with the gradient of λ · L_reg in training.
            routing_map: bool `[T, E]`, True where the gate is positive. With `moe_relu_max_experts` both keep only the
                largest gates of each token.
        """
        logits_TE = logits.view(-1, self.num_experts)
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_mask_T)
        if self.gate_scale is not None:
            logits_TE = normalize(logits_TE, dim=-1)
        if padding_mask_T is not None:  # no gates, and no gradient from the guard
            logits_TE = logits_TE.masked_fill(padding_mask_T.unsqueeze(-1), 0.0)
        # Count once: recomputation runs the forward pass twice, the first time without gradients.
        is_counted = self.training and torch.is_grad_enabled()
        if is_counted:
            probs_TE, map_TE, self.last_counts_EB = _RegularizedReLU.apply(logits_TE, padding_mask_T, self)
        else:
            probs_TE, map_TE, self.last_counts_EB, _ = self.backend.gate(logits_TE)
        scaled_TE = probs_TE if self.gate_scale is None else self.gate_scale(probs_TE)
        max_experts = self.config.moe_relu_max_experts
        if max_experts is None:
            return scaled_TE, map_TE
        self.last_counts_EB = None
        largest_TE = torch.zeros_like(map_TE).scatter_(1, probs_TE.detach().topk(max_experts, dim=1).indices, True)
        computed_TE = map_TE & largest_TE
        if is_counted:
            self.counts["left_out"].add_((map_TE & ~computed_TE).sum())
        # Gates that are left out still get the gradient of λ · L_reg: `_RegularizedReLU` has the whole map.
        return torch.where(computed_TE, scaled_TE, 0.0), computed_TE

    def count_extra_chunks(self, chunks: int) -> None:
        """Count the chunks beyond the first in which the layer runs this micro-batch."""
        if self.training and torch.is_grad_enabled():
            self.counts["extra_chunks"].add_(chunks / self.tp_cp_group.size())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return the tensors for a checkpoint, with the weight stored as `relu_weight` if `metadata` has `RELU_KEY`.

        A program that does not know ReLU routing looks for `weight` and stops, instead of loading a top-k router.
        Checkpoints of version 0.1 have `weight`.
        """
        tensors: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if (metadata or {}).get(RELU_KEY):
            tensors[f"{prefix}weight"].key = f"{prefix}relu_weight"
        return tensors

    def l1_coefficient(self) -> torch.Tensor:
        """Return λ = λ₀ · αⁿ as a float64 scalar on the device."""
        # A Python number to the power of an integer tensor would be computed in fp32.
        alpha = torch.full_like(self.l1_exponent, self.config.moe_relu_l1_reg_coeff_multiplier, dtype=torch.float64)
        return self.config.moe_relu_l1_reg_coeff_init * alpha**self.l1_exponent

    def relative_loads(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return f_e = E / (k T) · tokens of e, or 1 without load balancing, and T, both for whole sequences.

        Args:
            counts: int64 `[E + 1]`, this rank's tokens of each expert, then all its tokens without padding.

        Returns:
            f_E: fp32 `[E]`.
            T: int64 `[1]`, at least 1.
        """
        if self.tp_cp_group.size() > 1:  # tensor (sequence) and context parallelism split a sequence
            counts = reduce_from_tensor_model_parallel_region(counts.clone(), self.tp_cp_group)
        tokens_per_expert_E, num_tokens = counts[:-1], counts[-1:].clamp(min=1)
        if not self.config.moe_relu_l1_reg_load_balancing:
            return torch.ones_like(tokens_per_expert_E, dtype=torch.float32), num_tokens
        return tokens_per_expert_E * (self.num_experts / (self.config.moe_router_topk * num_tokens)), num_tokens

    def l1_gradients(self, f_E: torch.Tensor, num_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of λ · L_reg and of the guard.

        No gradient flows through f_e, so each active gate of expert e gets the gradient λ · f_e / T. A guarded layer
        has no L1, but the loss -0.1 · mean(logits) where its gates are off: a router that is off for every token has
        no other gradient, and would stay off.

        Args:
            f_E, num_tokens: f_e and T, as `relative_loads` returns them.

        Returns:
            d_l1_E: fp32 `[E]`, the gradient of each active gate.
            d_guard: fp32 `[1]`, the gradient of each inactive logit.
        """
        coefficient = self.l1_coefficient() * (1 - self.guarded)
        d_l1_E = coefficient.float() * f_E / num_tokens
        d_guard = 0.0 - GUARD_COEFFICIENT * self.guarded / (num_tokens * self.num_experts)  # never -0.0
        if self.calculate_per_token_loss:
            # finalize_model_grads divides every gradient by the number of tokens of the global batch.
            d_l1_E, d_guard = d_l1_E * num_tokens, d_guard * num_tokens
        return d_l1_E, d_guard


class _RegularizedReLU(torch.autograd.Function):
    """Compute the gates, and count the micro-batch; its L1 term and the guard are only in the gradient.

    d_logits = d_probs + λ · f_e / T where the gate is positive, and the guard's gradient elsewhere.

    Args:
        logits_TE: `[T, E]`.
        padding_mask_T: bool `[T]`, True at padding; or None.
        router: has the counts, λ and the backend.

    Returns:
        probs, routing map and counts, as `Backend.gate` returns them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TE: torch.Tensor, padding_mask_T: torch.Tensor | None, router: ReLURouter
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probs_TE, map_TE, counts_EB, gate_sums_E = router.backend.gate(logits_TE)
        if padding_mask_T is None:
            num_tokens = counts_EB.new_full((1,), len(logits_TE), dtype=torch.int64)
        else:
            num_tokens = (~padding_mask_T).sum(dim=0, keepdim=True)
        counts = torch.cat([counts_EB.sum(dim=1), num_tokens])
        f_E, sequence_tokens = router.relative_loads(counts)
        l1_loss = (f_E * gate_sums_E).sum() / sequence_tokens  # L_reg = 1/T · Σ_e f_e · Σ_t R(x_t)_e
        router.counts.add(counts, l1_loss, 1.0 / router.tp_cp_group.size())
        ctx.save_for_backward(map_TE, *router.l1_gradients(f_E, sequence_tokens))
        ctx.backend, ctx.dtype = router.backend, probs_TE.dtype
        ctx.mark_non_differentiable(map_TE, counts_EB)
        ctx.set_materialize_grads(False)  # otherwise PyTorch writes zeros for the map
        return probs_TE, map_TE, counts_EB

    @staticmethod
    def backward(ctx: Any, d_probs_TE: torch.Tensor | None, *_: None) -> tuple[torch.Tensor, None, None]:
        map_TE, d_l1_E, d_guard = ctx.saved_tensors
        if d_probs_TE is None:  # λ · L_reg has a gradient even if the gates have none
            d_probs_TE = torch.zeros_like(map_TE, dtype=ctx.dtype)
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale  # set by Megatron between forward and backward
        if scale is not None:
            d_l1_E, d_guard = d_l1_E * scale, d_guard * scale
        return ctx.backend.gate_backward(d_probs_TE, map_TE, d_l1_E, d_guard), None, None
