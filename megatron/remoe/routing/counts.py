"""Hold the routers' counts between two updates of λ, their sums over all ranks, and the figures of a step.

L layers, E experts. float64 adds whole numbers exactly, in any order, up to 2^53.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.routing.config import ReMoEConfig

COLUMNS = ("tokens", "l1_loss", "micro_batches", "left_out", "extra_chunks")  # after the tokens of each expert


class RoutingCounts:
    """One row of counts, or one row for each layer.

    Columns:

    - `tokens_per_expert`: E columns, active (token, expert) pairs;
    - `tokens`: tokens that the router saw;
    - `l1_loss`: L_reg, summed over micro-batches;
    - `micro_batches`: their number; each of n ranks that share a sequence adds 1/n;
    - `left_out`: active pairs that are not computed, because of `moe_relu_max_experts`;
    - `extra_chunks`: chunks beyond the first in which the layer ran, weighted like `micro_batches`.

    Attributes:
        table: float64 `[..., E + 5]`, in this order.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device) -> "RoutingCounts":
        """Return a row of zeros."""
        return cls(torch.zeros(num_experts + len(COLUMNS), dtype=torch.float64, device=device))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a view of a column, `[...]`, or of "tokens_per_expert", `[..., E]`."""
        if name == "tokens_per_expert":
            return self.table[..., : -len(COLUMNS)]
        return self.table[..., COLUMNS.index(name) - len(COLUMNS)]

    def add(self, counts: torch.Tensor, l1_loss: torch.Tensor, micro_batches: float) -> None:
        """Add a micro-batch to a row.

        Args:
            counts: integers `[E + 1]`, the tokens of each expert, then all tokens.
            l1_loss: this rank's part of L_reg, one element.
            micro_batches: this rank's share of a micro-batch.
        """
        self.table[: len(counts)] += counts
        self["l1_loss"].add_(l1_loss.squeeze())
        self["micro_batches"].add_(micro_batches)

    @property
    def active(self) -> torch.Tensor:
        """Active (token, expert) pairs, `[...]`."""
        return self["tokens_per_expert"].sum(dim=-1)

    @property
    def sparsity(self) -> torch.Tensor:
        """S = 1 - active pairs / (tokens · E), `[...]`; NaN without tokens."""
        return 1.0 - self.active / (self["tokens"] * self["tokens_per_expert"].shape[-1])


@dataclass(frozen=True)
class StepSums:
    """Everything that ranks add up after a step: the counts of all layers, and the state of their routers.

    Attributes:
        buffer: float64 `[L·(E + 8) + 1]`; the others are views of it.
        counts: a row for each layer.
        guarded: `[L]`, how many ranks guard the layer.
        l1_exponent: `[L]`, the sum of the ranks' exponent n of the layer's λ.
        ranks: `[L]`, the number of ranks that have the layer's router and add their n. `l1_exponent / ranks` is n.
        not_finite: a scalar, 0, or NaN if a gradient is not finite.
    """

    buffer: torch.Tensor
    counts: RoutingCounts
    guarded: torch.Tensor
    l1_exponent: torch.Tensor
    ranks: torch.Tensor
    not_finite: torch.Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "StepSums":
        """Return sums that are 0."""
        width = num_experts + len(COLUMNS)
        return cls.view(torch.zeros(num_layers * (width + 3) + 1, dtype=torch.float64, device=device), num_layers)

    @classmethod
    def view(cls, buffer: torch.Tensor, num_layers: int) -> "StepSums":
        """Return the sums whose fields are views of `buffer`."""
        sizes = [len(buffer) - 3 * num_layers - 1, num_layers, num_layers, num_layers, 1]
        table, guarded, l1_exponent, ranks, not_finite = buffer.split(sizes)
        counts = RoutingCounts(table.view(num_layers, -1))
        return cls(buffer, counts, guarded, l1_exponent, ranks, not_finite.squeeze())


@dataclass(frozen=True)
class RoutingSummary:
    """Figures of one optimizer step over all routers of the job, named as in SAVE/metrics.jsonl.

    Layers are numbered from 1: the decoder's, then those of multi-token prediction.

    Attributes:
        sparsity: S, share of inactive (token, expert) pairs over all MoE layers, 0 to 1.
        target_sparsity: 1 - k/E.
        l1_coefficient: λ during the step, the geometric mean over layers.
        l1_loss: L_reg summed over layers, mean over micro-batches (without λ).
        lowest_layer_sparsity, highest_layer_sparsity: extremes over the layers; 1 without layers.
        guarded_layers: layers without L1 whose gates were pushed up, because they were almost off in the step before.
        layer_sparsity: layer → its sparsity, to 6 decimals.
        layer_l1_coefficient: layer → its λ during the step, to 6 significant digits.
        layer_l1_loss: layer → its L_reg, to 6 significant digits.
        layer_chunks: layer → mean number of chunks over micro-batches and ranks, to 3 decimals. Above 1, the layer
            exceeded `moe_relu_activation_limit` and recomputed its experts.
        tokens_per_expert: layer → share of its tokens with a positive gate, `num_experts` values to 5 decimals.
    """

    sparsity: float
    target_sparsity: float
    l1_coefficient: float
    l1_loss: float
    lowest_layer_sparsity: float
    highest_layer_sparsity: float
    guarded_layers: list[int]
    layer_sparsity: dict[int, float]
    layer_l1_coefficient: dict[int, float]
    layer_l1_loss: dict[int, float]
    layer_chunks: dict[int, float]
    tokens_per_expert: dict[int, list[float]]

    @classmethod
    def compute(cls, sums: StepSums, config: ReMoEConfig) -> "RoutingSummary":
        """Compute the figures from a step's sums, which must be on the host."""
        rows = {number: RoutingCounts(row) for number, row in enumerate(sums.counts.table, start=1)}
        layers = {number: row for number, row in rows.items() if row["tokens"] > 0}  # dense layers count nothing
        all_layers = RoutingCounts(sums.counts.table.sum(dim=0))
        exponents_L = sums.l1_exponent / sums.ranks.clamp(min=1.0)
        init, multiplier = config.moe_relu_l1_reg_coeff_init, config.moe_relu_l1_reg_coeff_multiplier
        coefficients = {number: init * multiplier ** exponents_L[number - 1].item() for number in layers}
        mean_exponent = (exponents_L.sum() / (sums.ranks > 0).sum().clamp(min=1)).item()
        l1_losses = {number: (row["l1_loss"] / row["micro_batches"]).item() for number, row in layers.items()}
        sparsities = {number: row.sparsity.item() for number, row in layers.items()}
        shares = {number: (row["tokens_per_expert"] / row["tokens"]).tolist() for number, row in layers.items()}
        return cls(
            sparsity=all_layers.sparsity.item() if layers else 1.0,
            target_sparsity=config.target_sparsity,
            l1_coefficient=init * multiplier**mean_exponent,
            l1_loss=sum(l1_losses.values()),
            lowest_layer_sparsity=min(sparsities.values(), default=1.0),
            highest_layer_sparsity=max(sparsities.values(), default=1.0),
            guarded_layers=[number for number in layers if sums.guarded[number - 1] > 0],
            layer_sparsity={number: round(sparsity, 6) for number, sparsity in sparsities.items()},
            layer_l1_coefficient={number: float(f"{value:.6g}") for number, value in coefficients.items()},
            layer_l1_loss={number: float(f"{loss:.6g}") for number, loss in l1_losses.items()},
            layer_chunks={
                number: round(1 + (row["extra_chunks"] / row["micro_batches"]).item(), 3)
                for number, row in layers.items()
            },
            tokens_per_expert={number: [round(share, 5) for share in row] for number, row in shares.items()},
        )


def count_layers(modules: Iterable[torch.nn.Module], config: TransformerConfig) -> int:
    """Return the number of layers, MoE or dense, of the decoder and multi-token prediction on all ranks.

    Args:
        modules: the whole model on this rank.
        config: the model's configuration.
    """
    # Each depth of multi-token prediction is one layer, or in a hybrid model a pattern of layers that all ranks know.
    patterns = [pattern for module in modules if (pattern := getattr(module, "mtp_pattern", None))]
    return config.num_layers + (config.mtp_num_layers or 0) * max(map(len, patterns), default=1)


def layer_numbers(routers: Iterable[TopKRouter], modules: Iterable[torch.nn.Module], num_layers: int) -> list[int]:
    """Return each router's layer number, from 1.

    Layers of multi-token prediction, which Megatron numbers from 1 again, follow the decoder's.

    Args:
        routers: in the model's order.
        modules: the whole model on this rank.
        num_layers: layers of the decoder.
    """
    blocks = [module for module in modules if isinstance(module, MultiTokenPredictionBlock)]
    # In a hybrid model, routers do not know that they belong to multi-token prediction.
    predicting = {id(module) for block in blocks for module in block.modules()}
    next_numbers = itertools.count(num_layers + 1)
    return [next(next_numbers) if id(router) in predicting else router.layer_number for router in routers]
