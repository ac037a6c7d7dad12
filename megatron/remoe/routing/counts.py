"""Counts of the routers between two updates of λ, and the one tensor in which all ranks add them up.

Shapes: L layers, E experts. float64 adds whole numbers exactly, in any order, up to 2^53.
"""

from dataclasses import dataclass

import torch

COLUMNS = ("tokens", "l1_loss", "micro_batches", "left_out")  # after the tokens of each expert


class RoutingCounts:
    """One row of counts, or one row for each layer.

    Columns:

    - `tokens_per_expert`: E columns, active (token, expert) pairs;
    - `tokens`: tokens that the router saw;
    - `l1_loss`: L_reg, summed over micro-batches;
    - `micro_batches`: the ranks that share a sequence count one together;
    - `left_out`: active pairs that are not computed, because of `moe_relu_max_experts`.

    Attributes:
        table: float64 `[..., E + 4]`, in this order.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device) -> "RoutingCounts":
        """Return an empty row."""
        return cls(torch.zeros(num_experts + len(COLUMNS), dtype=torch.float64, device=device))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a view of a column, `[...]`, or of "tokens_per_expert", `[..., E]`."""
        if name == "tokens_per_expert":
            return self.table[..., : -len(COLUMNS)]
        return self.table[..., COLUMNS.index(name) - len(COLUMNS)]

    @property
    def active(self) -> torch.Tensor:
        """Active (token, expert) pairs, `[...]`."""
        return self["tokens_per_expert"].sum(dim=-1)

    def layer(self, number: int) -> "RoutingCounts":
        """Return a view of a layer's row; layers are numbered from 1."""
        return RoutingCounts(self.table[number - 1])


@dataclass(frozen=True)
class StepSums:
    """Everything that ranks add up after a step: the counts of all layers, and the state of their routers.

    Attributes:
        buffer: float64 `[L·(E + 4) + L + 3]`; the others are views of it.
        counts: a row for each layer.
        guarded: `[L]`, how many ranks guard the layer.
        l1_exponent: a scalar, the sum of the ranks' exponent n of λ.
        ranks: a scalar, how many ranks that sum is over: those with a router. The others learn λ from the mean.
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
        """Return empty sums."""
        width = num_experts + len(COLUMNS)
        return cls.of(torch.zeros(num_layers * (width + 1) + 3, dtype=torch.float64, device=device), num_layers)

    @classmethod
    def of(cls, buffer: torch.Tensor, num_layers: int) -> "StepSums":
        """Return the views of a buffer."""
        table, guarded, scalars = buffer.split([len(buffer) - num_layers - 3, num_layers, 3])
        return cls(buffer, RoutingCounts(table.view(num_layers, -1)), guarded, *scalars.unbind())
