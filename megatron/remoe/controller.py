"""Adaptive L1 coefficient: λ ← λ · α^sign(target − S), once per optimizer step (paper section 3.3)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron.remoe.config import ReMoEConfig
from megatron.remoe.router import ReLURouter


@dataclass(frozen=True)
class RoutingSummary:
    """What the routers of the whole job saw in one optimizer step, on the host.

    Attributes:
        sparsity: share of inactive (token, expert) pairs over all MoE layers, 0 to 1.
        target_sparsity: 1 − k/E.
        l1_coefficient: the λ that was in force during the step.
        l1_loss: L_reg summed over layers, mean over micro-batches (without λ).
        layer_sparsity: sparsity per MoE layer, keyed by layer number (from 1).
        expert_load: per MoE layer, the share of its tokens that each expert got, `num_experts` values.
        guarded_layers: numbers of the layers that were freed from L1 and pushed up, being all but off before.
    """

    sparsity: float
    target_sparsity: float
    l1_coefficient: float
    l1_loss: float
    layer_sparsity: dict[int, float]
    expert_load: dict[int, list[float]]
    guarded_layers: list[int]


class SparsityController:
    """Keeps the sparsity of all MoE layers together at the target.

    One small all-reduce per optimizer step carries the counts of all layers, from which every rank takes the same
    decision. Nothing is read back to the host, except by `summary`.
    """

    def __init__(self, model_chunks: Iterable[torch.nn.Module], config: ReMoEConfig) -> None:
        """
        Args:
            model_chunks: the model on this rank, all its virtual pipeline stages; may hold no router.
            config: the model's configuration.
        """
        chunks = list(model_chunks)
        assert config.num_moe_experts is not None
        self.config = config
        self.num_experts = config.num_moe_experts
        self.routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, ReLURouter)]
        parameter = next((parameter for chunk in chunks for parameter in chunk.parameters()), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        # A router that is off for all tokens has no gradient; every layer's norms have one.
        self._watched = [
            parameter
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if "norm" in name and parameter.requires_grad
        ] + [router.weight for router in self.routers]
        self._table: torch.Tensor | None = None

    @torch.no_grad()
    def update(self) -> None:
        """Sum the counts over all ranks, move λ one step towards the target, guard dying layers, and count anew.

        To be called once per optimizer step on every rank, after the backward passes.
        """
        table = self._collect()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Every rank counted tokens of its own, whatever the layout: the sum over the world is the whole batch.
            torch.distributed.all_reduce(table)
        self._table = table

        total = table.sum(dim=0)
        active, tokens = total[: self.num_experts].sum(), total[self.num_experts]
        # (1 − k/E) − S has the sign of active − k·tokens: exact in whole numbers, and 0 on the target.
        # A step with anything that is not finite is none: Megatron skips it in fp16, and ends the training otherwise.
        finite = torch.isfinite(total).all()
        direction = torch.where(finite, torch.sign(active - self.config.moe_router_topk * tokens), 0.0)
        exponent = (self._exponent(table) + direction).to(torch.int64)
        for router in self.routers:
            router.l1_exponent.copy_(exponent)
            row = table[router.layer_number - 1]
            floor = self.config.moe_relu_layer_floor * self.config.moe_router_topk * row[self.num_experts]
            dying = row[: self.num_experts].sum() < floor
            router.guarded.copy_(torch.where(finite, dying, router.guarded))

    def summary(self) -> RoutingSummary | None:
        """The last step's figures (one transfer to the host), or None before the first update."""
        if self._table is None:
            return None
        rows = self._table.tolist()
        experts, topk = self.num_experts, self.config.moe_router_topk
        layers = {number: row for number, row in enumerate(rows, start=1) if row[experts] > 0}
        tokens = sum(row[experts] for row in layers.values())
        active = sum(sum(row[:experts]) for row in layers.values())
        exponent = sum(row[-2] for row in rows) / max(1.0, sum(row[-1] for row in rows))
        return RoutingSummary(
            sparsity=1.0 - active / (tokens * experts) if tokens else 1.0,
            target_sparsity=1.0 - topk / experts,
            l1_coefficient=self.config.moe_relu_l1_reg_coeff_init
            * self.config.moe_relu_l1_reg_coeff_multiplier**exponent,
            l1_loss=sum(row[experts + 1] / row[experts + 2] for row in layers.values()),
            layer_sparsity={n: 1.0 - sum(row[:experts]) / (row[experts] * experts) for n, row in layers.items()},
            expert_load={n: [count / row[experts] for count in row[:experts]] for n, row in layers.items()},
            guarded_layers=[n for n, row in layers.items() if row[-3] > 0],
        )

    def _collect(self) -> torch.Tensor:
        """`[num_layers, num_experts + 7]` float64: each router's counts, a zero, its guard, λ's exponent, a 1; zeroes
        where there is no router. The zero of the first layer is NaN if a gradient on this rank is not finite.

        Counts are whole numbers, which float64 sums exactly in any order (up to 2^53).
        """
        table = torch.zeros(self.config.num_layers, self.num_experts + 7, dtype=torch.float64, device=self.device)
        for router in self.routers:
            row = table[router.layer_number - 1]
            if router.counts is not None:
                row[:-4] = router.counts
                router.counts.zero_()
            row[-3] = router.guarded
            row[-2] = router.l1_exponent
            row[-1] = 1.0
        gradients = [getattr(parameter, "main_grad", parameter.grad) for parameter in self._watched]
        flat = [gradient.reshape(-1) for gradient in gradients if gradient is not None]
        if flat:
            table[0, -4] = 0.0 * torch.cat(flat).sum()
        return table

    @staticmethod
    def _exponent(table: torch.Tensor) -> torch.Tensor:
        """λ's exponent, the same on all routers, as their mean: pipeline ranks without a router learn it so."""
        return torch.round(table[:, -2].sum() / table[:, -1].sum().clamp(min=1.0))
