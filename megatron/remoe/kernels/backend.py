"""The backend of a router and of a MoE layer: PyTorch or Triton, chosen once when they are built.

T tokens, E experts, P pairs (of a token and an expert that is active for it), H hidden size, F the experts' FFN size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from megatron.remoe.kernels import wants_kernels, wants_quack


class Order(Protocol):
    """The pairs, sorted by expert and then by token: maps tokens to pairs and back."""

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        """Return each pair's token, `[P, H]`."""

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Return each token's sum over its pairs, `[T, H]` of the same type, added up in fp32 at least."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The tensors that it is built from, for the backward pass to save."""


@dataclass(frozen=True)
class Regularization:
    """Settings of what the router adds to the gradient of the language loss.

    Attributes:
        topk: k of the target sparsity 1 - k/E.
        init, multiplier: λ = init · multiplier^n.
        guard: the gradient of the mean logit of a guarded layer, where its gates are off.
        balances: whether f_e weighs each expert's gates by its share of the tokens; otherwise it is 1.
    """

    topk: int
    init: float
    multiplier: float
    guard: float
    balances: bool


@dataclass(frozen=True)
class Products:
    """The experts' products, fused with what lies around them, in bf16 on a GPU. None reads a size on the host.

    Each takes `starts`, int32 `[E + 1]`, the bounds of each expert's pairs, of which the last may be below P; and an
    `index`, int32 `[P]`, of the row of each pair, or None if there are P rows in this order.

    Attributes:
        up: rows `[.., H]`, index, gates fp32 `[P]`, fc1 `[E, 2 * F, H]`, starts → the first product `[P, 2 * F]`, in a
            layout of its own; `gate · SiLU(left) ⊙ right` `[P, F]`.
        down: the latter, fc2 `[E, H, F]`, starts → `[P, H]`.
        down_backward: gradient `[.., H]`, index, gates, fc2, first product, starts → its gradient; `[P, F]` as of `up`;
            the gates' gradient, fp32 `[P]`.
        up_backward: gradient of the first product, fc1, starts → `[P, H]`.
        outers: rows `[.., H]`, index, columns `[P, X]`, out `[E, H, X]`, starts, whether the columns have the layout of
            the first product, whether to add to `out` → None; writes each expert's `rows[index].T @ columns`.
    """

    up: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    down: Callable[..., torch.Tensor]
    down_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    up_backward: Callable[..., torch.Tensor]
    outers: Callable[..., None]


@dataclass(frozen=True)
class Backend:
    """The functions of one backend. Those of `pytorch.py` are the reference and say what each takes and returns.

    Attributes:
        products: returns those of grouped experts, where they are used: they need a GPU. None for PyTorch's.
        pair_multiple: room for the pairs of grouped experts is a multiple of this, where nothing is sent.
    """

    relu_routing: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    count: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    plan: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[Order, torch.Tensor]]
    activate: Callable[..., torch.Tensor]
    activate_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    products: Callable[[], Products] | None = None
    pair_multiple: int = 1


def backend_of(config: object) -> Backend:
    """Return the backend that a configuration asks for by `moe_kernels`; Megatron's own cannot, and gets PyTorch's."""
    if wants_kernels(config):
        from megatron.remoe.kernels.triton import TRITON

        # QuACK caches results for each number of rows, so use few.
        return replace(TRITON, products=_quack_products, pair_multiple=2048) if wants_quack(config) else TRITON
    from megatron.remoe.kernels.pytorch import PYTORCH

    return PYTORCH


def _quack_products() -> Products:
    from megatron.remoe.kernels.quack import PRODUCTS

    return PRODUCTS
