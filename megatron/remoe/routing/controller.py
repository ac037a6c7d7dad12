"""Adaptive L1 coefficient: λ ← λ · α^sign(target − S), once per optimizer step (paper section 3.3)."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.remoe.kernels import wants_kernels
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.counts import RoutingCounts
from megatron.remoe.routing.router import ReLURouter


@dataclass(frozen=True)
class RoutingSummary:
    """What the routers of the whole job saw in one optimizer step, on the host.

    Attributes:
        sparsity: share of inactive (token, expert) pairs over all MoE layers, 0 to 1.
        target_sparsity: 1 − k/E.
        l1_coefficient: the λ that was in force during the step.
        l1_loss: L_reg summed over layers, mean over micro-batches (without λ).
        layer_l1_loss: the same of each MoE layer, keyed as `layer_sparsity`.
        layer_sparsity: sparsity per MoE layer, keyed by layer number (from 1): the decoder's, then those of multi-token
            prediction.
        expert_load: per MoE layer, the share of its tokens that each expert got, `num_experts` values.
        guarded_layers: numbers of the layers that were freed from L1 and pushed up, being all but off before.
    """

    sparsity: float
    target_sparsity: float
    l1_coefficient: float
    l1_loss: float
    layer_l1_loss: dict[int, float]
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
        modules = [module for chunk in model_chunks for module in chunk.modules()]
        assert config.num_moe_experts is not None
        self.config = config
        self.num_experts = config.num_moe_experts
        self.routers = [module for module in modules if isinstance(module, ReLURouter)]
        parameter = next((parameter for module in modules for parameter in module.parameters()), None)
        self.device = parameter.device if parameter is not None else torch.device("cpu")
        self._numbers = layer_numbers(self.routers, modules, config.num_layers)
        self._num_layers = max([config.num_layers, *self._numbers])
        if config.mtp_num_layers:  # whose layers one stage has, and others may not know how many are MoE
            self._num_layers = _agreed_maximum(self._num_layers, self.device)
        # A router that is off for all tokens has no gradient; every layer's norms have one.
        self._watched = [*norm_weights(modules), *(router.weight for router in self.routers)]
        self._counts: RoutingCounts | None = None
        self._kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
        if wants_kernels(config):
            from megatron.remoe.kernels.update import decide

            self._kernel = decide

    @torch.no_grad()
    def update(self) -> None:
        """Sum the counts over all ranks, move λ one step towards the target, guard dying layers, and count anew.

        To be called once per optimizer step on every rank, after the backward passes.
        """
        counts = self._collect()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Every rank counted tokens of its own, whatever the layout: the sum over the world is the whole batch.
            torch.distributed.all_reduce(counts.table)
        self._counts = counts

        exponent, guarded = self._decide(counts)
        if self.routers:
            of_layers = guarded.unbind()
            # All routers at once: a launch for each of them would be most of the update.
            torch._foreach_copy_(
                [*(router.l1_exponent for router in self.routers), *(router.guarded for router in self.routers)],
                [exponent] * len(self.routers) + [of_layers[number - 1] for number in self._numbers],
            )

    def _decide(self, counts: RoutingCounts) -> tuple[torch.Tensor, torch.Tensor]:
        """λ's exponent, an int64 scalar, and which layers to guard, int64 `[num_layers]`, after what was counted."""
        topk = self.config.moe_router_topk
        least_active = self.config.moe_relu_layer_floor * topk
        if self._kernel is not None:
            columns = ("tokens", "l1_loss", "not_finite", "guarded", "l1_exponent", "routers")
            return self._kernel(*(counts[name] for name in ("tokens_per_expert", *columns)), topk, least_active)
        active, total = counts.active, counts.total()
        # (1 − k/E) − S has the sign of active − k·tokens: exact in whole numbers, and 0 on the target.
        # A step with anything that is not finite is none: Megatron skips it in fp16, and ends the training otherwise.
        finite = torch.isfinite(total.table).all()
        direction = torch.where(finite, torch.sign(active.sum() - topk * total["tokens"]), 0.0)
        # The exponent is the same on all routers, so their mean: pipeline ranks without a router learn it so.
        exponent = torch.round(total["l1_exponent"] / total["routers"].clamp(min=1.0))
        dying = active < least_active * counts["tokens"]
        guarded = torch.where(finite, dying, counts["guarded"] > 0)
        return (exponent + direction).to(torch.int64), guarded.to(torch.int64)

    def summary(self) -> RoutingSummary | None:
        """The last step's figures (one transfer to the host), or None before the first update."""
        if self._counts is None:
            return None
        counts = self._counts.on_host()
        total, experts = counts.total(), self.num_experts
        rows = {number: counts.layer(number) for number in range(1, self._num_layers + 1)}
        layers = {number: row for number, row in rows.items() if row["tokens"] > 0}
        l1_losses = {number: (row["l1_loss"] / row["micro_batches"]).item() for number, row in layers.items()}
        tokens, exponent = total["tokens"].item(), (total["l1_exponent"] / total["routers"].clamp(min=1.0)).item()
        return RoutingSummary(
            sparsity=1.0 - total.active.item() / (tokens * experts) if tokens else 1.0,
            target_sparsity=self.config.target_sparsity,
            l1_coefficient=self.config.moe_relu_l1_reg_coeff_init
            * self.config.moe_relu_l1_reg_coeff_multiplier**exponent,
            l1_loss=sum(l1_losses.values()),
            layer_l1_loss=l1_losses,
            layer_sparsity={n: 1.0 - (row.active / (row["tokens"] * experts)).item() for n, row in layers.items()},
            expert_load={n: (row["tokens_per_expert"] / row["tokens"]).tolist() for n, row in layers.items()},
            guarded_layers=[number for number, row in layers.items() if row["guarded"] > 0],
        )

    def _collect(self) -> RoutingCounts:
        """This rank's counts, a row for each layer: zeros where it has no router. The routers begin anew."""
        counts = RoutingCounts.zeros(self.num_experts, self.device, self._num_layers)
        layers = [counts.layer(number) for number in self._numbers]
        counted = [
            (layer.table, router.counts.table)
            for layer, router in zip(layers, self.routers, strict=True)
            if router.counts is not None
        ]
        if counted:
            rows, seen = map(list, zip(*counted, strict=True))
            torch._foreach_copy_(rows, seen)
            torch._foreach_zero_(seen)
        if layers:
            torch._foreach_copy_(
                [layer[name] for name in ("guarded", "l1_exponent") for layer in layers],
                [*(router.guarded for router in self.routers), *(router.l1_exponent for router in self.routers)],
            )
            torch._foreach_add_([layer["routers"] for layer in layers], 1.0)
        gradients = [getattr(parameter, "main_grad", parameter.grad) for parameter in self._watched]
        flat = [gradient.reshape(-1) for gradient in gradients if gradient is not None]
        if flat:
            torch.mul(torch.cat(flat).sum(), 0.0, out=counts.layer(1)["not_finite"])
        return counts


def layer_numbers(routers: Iterable[TopKRouter], modules: Iterable[torch.nn.Module], num_layers: int) -> list[int]:
    """Each router's layer, from 1; those of multi-token prediction, which Megatron counts anew, after the decoder's.

    Args:
        routers: of Megatron's classes, in the model's order.
        modules: all of the model on this rank.
        num_layers: the decoder's.
    """
    blocks = [module for module in modules if isinstance(module, MultiTokenPredictionBlock)]
    predicting = {id(module) for block in blocks for module in block.modules()}  # which a hybrid's routers are not told
    after = itertools.count(num_layers + 1)
    return [next(after) if id(router) in predicting else router.layer_number for router in routers]


def _agreed_maximum(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers. Waits for the device."""
    largest = torch.tensor(number, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def norm_weights(modules: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    """The trained vectors of PyTorch's, Megatron's and Transformer Engine's norms, also of those in a linear layer."""
    norms: tuple[type, ...] = (torch.nn.LayerNorm, torch.nn.RMSNorm, FusedLayerNorm)
    if transformer_engine.HAVE_TE:
        engine = transformer_engine.te.pytorch
        norms += (engine.LayerNorm, engine.RMSNorm, engine.LayerNormLinear)
    for module in modules:
        if isinstance(module, norms):
            vectors = (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 1)
            yield from (vector for vector in vectors if vector.requires_grad)
