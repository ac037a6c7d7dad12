"""The backend of PyTorch's operations: the default, and the reference for the Triton kernels.

T tokens, E experts, B blocks of tokens (here 1), P pairs (of a token and an expert that is active for it), H hidden
size, F the experts' FFN size.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import silu

from megatron.remoe.kernels.interface import Backend


def gate(logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the ReLU gates, the map of positive gates, and each expert's number of tokens and sum of gates.

    Args:
        logits_TE: `[T, E]`, of any floating-point type.

    Returns:
        probs: `[T, E]`, of the type of `logits_TE`.
        routing_map: bool `[T, E]`, True where `probs` is positive.
        counts: as `count` returns them for this map.
        sums: fp32 `[E]`, the sums of `probs` over the tokens.
    """
    map_TE = logits_TE > 0
    probs_TE = torch.where(map_TE, logits_TE, 0.0)
    return probs_TE, map_TE, count(map_TE), probs_TE.float().sum(dim=0)


def gate_backward(
    d_probs_TE: torch.Tensor, map_TE: torch.Tensor, on_E: torch.Tensor, off: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the logits, `[T, E]`: d_probs + on_e for active pairs, off for the others.

    Args:
        d_probs_TE: `[T, E]`, the gradient of the probs.
        map_TE: bool `[T, E]`.
        on_E: `[E]`, added to the gradient where the map is True.
        off: one element, the gradient where the map is False.
    """
    dtype = d_probs_TE.dtype
    return torch.where(map_TE, d_probs_TE + on_E.to(dtype), off.to(dtype))


def count(map_TE: torch.Tensor) -> torch.Tensor:
    """Count the tokens of each expert.

    Args:
        map_TE: bool `[T, E]`.

    Returns:
        Integers `[E, B]`, by blocks of tokens.
    """
    return map_TE.sum(dim=0).unsqueeze(1)


class TokenOrder(NamedTuple):
    """An `Order` by the token of each pair.

    Attributes:
        token_index_P: int64 `[P]`, the token of each pair.
    """

    token_index_P: torch.Tensor

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        return tokens_TH.index_select(0, self.token_index_P)

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        dtype = torch.promote_types(pairs_PH.dtype, torch.float32)
        sums_TH = pairs_PH.new_zeros(num_tokens, pairs_PH.shape[1], dtype=dtype)
        # Casting all pairs at once would take twice their memory.
        rows = len(pairs_PH) if pairs_PH.dtype == dtype else num_tokens
        for start in range(0, len(pairs_PH), rows or 1):
            part = slice(start, start + rows)
            sums_TH.index_add_(0, self.token_index_P[part], pairs_PH[part].to(dtype))
        return sums_TH.to(pairs_PH.dtype)


class SortedPairs(NamedTuple):
    """The identity, an `Order` for rows that are already pairs, sorted by expert."""

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        return tokens_TH

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return pairs_PH


def plan(
    probs_TE: torch.Tensor, map_TE: torch.Tensor, counts_EB: torch.Tensor, num_pairs: int
) -> tuple[TokenOrder, torch.Tensor]:
    """Sort the pairs by expert, without a host wait.

    Args:
        probs_TE: `[T, E]`, the gates.
        map_TE: bool `[T, E]`.
        counts_EB: as `count` returns them for this map; not needed here.
        num_pairs: P, the number of True elements of the map.

    Returns:
        The order, and the gates `[P]` of the type of `probs_TE`, through which gradients flow.
    """
    expert_index, token_index = torch.nonzero_static(map_TE.T, size=num_pairs).unbind(dim=1)
    gates_P = probs_TE.reshape(-1).gather(0, token_index * probs_TE.shape[1] + expert_index)
    return TokenOrder(token_index), gates_P


def activate(hidden: torch.Tensor, gates_P: torch.Tensor) -> torch.Tensor:
    """Return `gate · SiLU(left) ⊙ right`, `[P, F]`.

    Args:
        hidden: `[P, 2 * F]`, left and then right.
        gates_P: `[P]`.
    """
    left, right = hidden.chunk(2, dim=-1)
    return silu(left).mul_(right).mul_(gates_P.unsqueeze(-1))


def activate_backward(
    hidden: torch.Tensor, gates_P: torch.Tensor, d_activated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `activate`'s result again, then the gradients of `hidden` and `gates_P`.

    Args:
        hidden, gates_P: as for `activate`.
        d_activated: `[P, F]`, the gradient of the result; its memory is overwritten.
    """
    left, right = hidden.chunk(2, dim=-1)
    activation = silu(left)
    activated = activation * right
    d_gates = (d_activated * activated).sum(dim=-1, dtype=gates_P.dtype)
    activated.mul_(gates_P.unsqueeze(-1))
    d_activated.mul_(gates_P.unsqueeze(-1))
    d_hidden = torch.empty_like(hidden)
    d_left, d_right = d_hidden.chunk(2, dim=-1)
    torch.mul(d_activated, activation, out=d_right)
    torch.ops.aten.silu_backward.grad_input(d_activated.mul_(right), left, grad_input=d_left)
    return activated, d_hidden, d_gates


PYTORCH = Backend(gate, gate_backward, count, plan, activate, activate_backward)
