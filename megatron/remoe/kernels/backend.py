"""The backend of a router and of a MoE layer: PyTorch or Triton, chosen once when they are built.

T tokens, E experts, P pairs (of a token and an expert that is active for it), H hidden size, F the experts' FFN size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron.remoe.kernels import wants_kernels


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
class Backend:
    """The functions of one backend. Those of `pytorch.py` are the reference and say what each takes and returns."""

    relu_routing: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    count: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    plan: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[Order, torch.Tensor]]
    activate: Callable[..., torch.Tensor]
    activate_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def backend_of(config: object) -> Backend:
    """Return the backend that a configuration asks for by `moe_kernels`; Megatron's own cannot, and gets PyTorch's."""
    if wants_kernels(config):
        from megatron.remoe.kernels.triton import TRITON

        return TRITON
    from megatron.remoe.kernels.pytorch import PYTORCH

    return PYTORCH
