"""Hold the sparsity S at its target with an adaptive L1 coefficient λ (paper section 3.3).

Once per optimizer step, after its backward passes (training/routing_hooks.py calls `update`), with k experts per token
as the target and α slightly above 1:

    target = 1 - k/E
    S      = 1 - active pairs / (tokens · E)      over all MoE layers and the global batch
    λ      ← λ · α^sign(target - S)

With `moe_relu_sparsity_scope` "layer", each layer has its own S and λ. The routers keep λ = λ₀ · α^n as the integer n,
so the update adds -1, 0 or 1 to n. Unlike in the paper, λ stays from `SMALLEST_COEFFICIENT` to `LARGEST_COEFFICIENT`;
the range includes λ₀.

L layers, dense ones included.
"""

import math
from collections.abc import Iterable

import torch

from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.counts import RoutingSummary, StepSums, count_layers, layer_numbers
from megatron.remoe.routing.router import ReLURouter

# While the learning rate is tiny, routers cannot reach the target, and λ would grow until the gradient's norm is Inf.
# While S stays above the target, n would fall without end, and need as many steps to return. 1e-8 is λ₀'s default.
SMALLEST_COEFFICIENT, LARGEST_COEFFICIENT = 1e-8, 1e3


class SparsityController:
    """Move λ, and guard layers that are almost off, once per optimizer step.

    One small all-reduce adds up the counts of all layers, and every rank makes the same decision from the result.
    `update` does not wait for the device; `summary` and `totals` do.
    """

    def __init__(self, model_chunks: Iterable[torch.nn.Module], config: ReMoEConfig) -> None:
        """
        Args:
            model_chunks: all virtual pipeline stages of the model on this rank; they might have no router.
            config: the model's configuration.
        """
        modules = [module for chunk in model_chunks for module in chunk.modules()]
        assert config.num_moe_experts is not None
        self.config, self.num_experts = config, config.num_moe_experts
        self.routers = [module for module in modules if isinstance(module, ReLURouter)]
        self.device = torch.device(torch.cuda.current_device())
        self._rows = [number - 1 for number in layer_numbers(self.routers, modules, config.num_layers)]
        self._row_indices = torch.tensor(self._rows, dtype=torch.int64, device=self.device)
        self._num_layers = count_layers(modules, config)
        self._smallest_exponent, self._largest_exponent = (
            int(math.log(bound / config.moe_relu_l1_reg_coeff_init, config.moe_relu_l1_reg_coeff_multiplier))
            for bound in (SMALLEST_COEFFICIENT, LARGEST_COEFFICIENT)
        )
        # Gradients watched for NaN and Inf. With fp16, the optimizer skips a step if any gradient overflows. Otherwise
        # NaN and Inf spread: the routers show them, or the vectors (norms and biases) if all routers are off.
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        router_weights = {id(router.weight) for router in self.routers}
        self._watched = [
            weight for weight in weights if config.fp16 or weight.dim() == 1 or id(weight) in router_weights
        ]
        self._last: StepSums | None = None
        # `[2, layers]`: computed pairs and tokens of each layer, over all steps.
        self.running_sums = torch.zeros(2, self._num_layers, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def update(self) -> None:
        """Sum the counts of all ranks, move each λ by at most a factor α, choose the layers to guard, reset the counts.

        Call it once per optimizer step on every rank, after the backward passes.
        """
        self._last = sums = self._collect()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # In every layout, each rank has counted different tokens or different layers.
            torch.distributed.all_reduce(sums.buffer)
        topk, active_L, tokens_L = self.config.moe_router_topk, sums.counts.active, sums.counts["tokens"]
        computed_L = active_L - sums.counts["left_out"] if self.config.moe_relu_max_experts else active_L
        torch._foreach_add_(list(self.running_sums), [computed_L, tokens_L])
        if not self.routers:
            return
        # The optimizer skips a step that is not finite, or Megatron stops: λ and the guarded layers stay unchanged.
        is_finite = torch.isfinite(sums.buffer).all()
        # target - S = (active - k · tokens) / (tokens · E). The sign of the whole number active - k · tokens is exact.
        excess_L = active_L - topk * tokens_L
        if self.config.moe_relu_sparsity_scope == "model":
            excess_L = excess_L.sum().expand_as(excess_L)
        direction_L = torch.where(is_finite, torch.sign(excess_L), 0.0).to(torch.int64)
        exponents = torch.stack([router.l1_exponent for router in self.routers]) + direction_L[self._row_indices]
        exponents.clamp_(min(self._smallest_exponent, 0), max(self._largest_exponent, 0))
        is_almost_off_L = active_L < self.config.moe_relu_layer_floor * topk * tokens_L
        guarded_L = torch.where(is_finite, is_almost_off_L, sums.guarded > 0).to(torch.int64)
        # One launch for all routers.
        torch._foreach_copy_(
            [*(router.l1_exponent for router in self.routers), *(router.guarded for router in self.routers)],
            [*exponents, *(guarded_L[row] for row in self._rows)],
        )

    def _collect(self) -> StepSums:
        """Return this rank's counts and state, with 0 for layers that it does not have, and reset its counts."""
        sums = StepSums.zeros(self._num_layers, self.num_experts, self.device)
        if self.routers:
            tables = [router.counts.table for router in self.routers]
            torch._foreach_copy_([sums.counts.table[row] for row in self._rows], tables)
            torch._foreach_zero_(tables)
            torch._foreach_copy_(
                [*(sums.guarded[row] for row in self._rows), *(sums.l1_exponent[row] for row in self._rows)],
                [*(router.guarded for router in self.routers), *(router.l1_exponent for router in self.routers)],
            )
            sums.ranks.index_fill_(0, self._row_indices, 1.0)
        gradients = [getattr(parameter, "main_grad", parameter.grad) for parameter in self._watched]
        if gradients := [gradient for gradient in gradients if gradient is not None]:
            # 0 · x is 0, or NaN if a gradient is not finite; the all-reduce spreads NaN to all ranks. Sum in fp32: a
            # loss scale makes fp16 gradients large, and their sum could overflow.
            largest = torch.stack(torch._foreach_norm(gradients, torch.inf))
            torch.mul(largest.sum(dtype=torch.float32), 0.0, out=sums.not_finite)
        return sums

    def totals(self) -> dict[str, int]:
        """Return the computed pairs, and the tokens times MoE layers, of all updates. Waits for the device.

        Computed pairs are the active pairs that `moe_relu_max_experts` does not leave out.
        """
        computed, tokens = map(int, self.running_sums.sum(dim=1).tolist())
        return {"total_active_pairs": computed, "total_layer_tokens": tokens}

    def summary(self) -> RoutingSummary | None:
        """Return the last step's figures, or None before the first update. Waits for the device."""
        if self._last is None:
            return None
        sums = StepSums.view(self._last.buffer.cpu(), self._num_layers)
        return RoutingSummary.compute(sums, self.config)
