"""The operations that a backend computes for a router and a MoE layer.

T tokens, E experts, B blocks of tokens, P pairs (of a token and an expert that is active for it), H hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


class Order(Protocol):
    """The pairs, sorted by expert and then by token: maps tokens to pairs and back."""

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        """Return each pair's token, `[P, H]`."""

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Return each token's sum over its pairs, `[T, H]` of the same type, added up in fp32 at least."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield the tensors that it is built from; autograd saves them for the backward pass."""


@dataclass(frozen=True)
class Backend:
    """The functions of one backend. Those of `pytorch.py` are the reference; their docstrings state the contract.

    Attributes:
        gate: logits_TE → probs_TE, map_TE, counts_EB, sums_E.
        gate_backward: d_probs_TE, map_TE, on_E, off → d_logits_TE.
        count: map_TE → counts_EB.
        plan: probs_TE, map_TE, counts_EB, num_pairs → order, gates_P.
        activate: hidden, gates_P → activated.
        activate_backward: hidden, gates_P, d_activated → activated, d_hidden, d_gates.
    """

    gate: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
    gate_backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    count: Callable[[torch.Tensor], torch.Tensor]
    plan: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], tuple[Order, torch.Tensor]]
    activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    activate_backward: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ]
