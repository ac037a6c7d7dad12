"""What routers count between two updates of λ, with names for the columns."""

import torch

# Beside the tokens of each expert. All but `l1_loss` are whole numbers or shares of one, and `not_finite` is 0 or NaN.
COLUMNS = ("tokens", "l1_loss", "micro_batches", "not_finite", "guarded", "l1_exponent", "routers")


class RoutingCounts:
    """One row of counts, or one for each layer, in one tensor that a single all-reduce sums.

    Whole numbers, which float64 adds up exactly in any order (to 2^53):

    - `tokens_per_expert`: `num_experts` columns, active (token, expert) pairs;
    - `tokens`: that the router saw;
    - `l1_loss`: L_reg, summed over micro-batches;
    - `micro_batches`: counted once by the ranks that share a sequence together;
    - `not_finite`: 0, or NaN where a gradient is not finite;
    - `guarded`, `l1_exponent`: the router's buffers of that name, summed over ranks;
    - `routers`: how many they were summed over.

    Attributes:
        table: float64 `[..., num_experts + len(COLUMNS)]`.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device, num_layers: int | None = None) -> "RoutingCounts":
        """Nothing counted yet: one row, or `num_layers` of them."""
        shape = [] if num_layers is None else [num_layers]
        return cls(torch.zeros(*shape, num_experts + len(COLUMNS), dtype=torch.float64, device=device))

    def __getitem__(self, name: str) -> torch.Tensor:
        """A view of a column, `[...]`, or of "tokens_per_expert", `[..., num_experts]`, to read and to write."""
        if name == "tokens_per_expert":
            return self.table[..., : -len(COLUMNS)]
        return self.table[..., COLUMNS.index(name) - len(COLUMNS)]

    @property
    def active(self) -> torch.Tensor:
        """Active (token, expert) pairs, `[...]`."""
        return self["tokens_per_expert"].sum(dim=-1)

    @torch.no_grad()
    def add(self, tokens: torch.Tensor, l1_loss: torch.Tensor, micro_batches: float) -> None:
        """Count one forward pass of a router.

        Args:
            tokens: int64 `[num_experts + 1]`, those of each expert and then all.
            l1_loss: L_reg, a scalar.
            micro_batches: 1, or this rank's share of it.
        """
        self.table[: len(tokens)] += tokens
        self["l1_loss"].add_(l1_loss)
        self["micro_batches"].add_(micro_batches)

    def layer(self, number: int) -> "RoutingCounts":
        """The row of a layer, a view; layers are numbered from 1."""
        return RoutingCounts(self.table[number - 1])

    def total(self) -> "RoutingCounts":
        """One row, the sum over layers."""
        return RoutingCounts(self.table.sum(dim=0))

    def on_host(self) -> "RoutingCounts":
        """A copy on the host; waits for the device."""
        return RoutingCounts(self.table.cpu())
