"""The backend of PyTorch's operations: the default, and the reference of what the Triton kernels compute.

T tokens, E experts, P pairs (of a token and an expert that is active for it), H hidden size, F the experts' FFN size.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import silu

from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.remoe.kernels.backend import Backend, Regularization


def relu_routing(
    regularization: Regularization,
    logits_TE: torch.Tensor,
    padding_mask_T: torch.Tensor | None,
    exponent: torch.Tensor,
    guarded: torch.Tensor,
    counts: torch.Tensor,
    group: torch.distributed.ProcessGroup,
    per_token: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gates, with the gradient of λ · L_reg attached, and the routing map (paper sections 3.2 to 3.4).

        G_te  = ReLU(logits_te)                       the gates; expert e is active for token t where G_te > 0
        f_e   = E / (k T) · Σ_t 1[G_te > 0]           no gradient flows through it; without load balancing 1 (eq. 9)
        L_reg = 1/T · Σ_t Σ_e f_e · G_te

    A guarded layer has no L1, but the loss -guard · mean(logits) where its gates are off: a router that is off for
    every token has no other gradient, and would stay off.

    Args:
        regularization: its settings.
        logits_TE: `[T, E]`, of any floating-point type.
        padding_mask_T: bool `[T]`, True at padding, which is neither routed nor counted.
        exponent: int64 scalar n of λ.
        guarded: int64 scalar, 1 where the layer is freed from L1 and pushed up.
        counts: float64; the pairs of each expert, tokens, L_reg and micro-batches are added to its first E + 3.
        group: the ranks that share a sequence.
        per_token: whether gradients are divided by the number of tokens of the global batch later.

    Returns:
        probs: `[T, E]`, of the type of `logits_TE`.
        routing_map: bool `[T, E]`.
    """
    num_tokens, num_experts = logits_TE.shape
    map_TE = active(logits_TE, padding_mask_T)
    if padding_mask_T is None:
        tokens = map_TE.new_full((1,), num_tokens, dtype=torch.int64)
    else:
        tokens = (~padding_mask_T).sum(dim=0, keepdim=True)
    own_counts = torch.cat([map_TE.sum(dim=0), tokens])
    # The tokens of one sequence may be split over tensor (sequence) and context parallel ranks.
    sequence_counts = own_counts
    if group.size() > 1:
        sequence_counts = reduce_from_tensor_model_parallel_region(own_counts.clone(), group)
    active_E, sequence_tokens = sequence_counts[:-1], sequence_counts[-1].clamp(min=1)

    coefficient = l1_coefficient(regularization, exponent) * (1 - guarded)
    push = 0.0 - regularization.guard * guarded / (sequence_tokens * num_experts)
    if per_token:
        # finalize_model_grads divides every gradient by the number of tokens of the global batch.
        scale = tokens[0] * group.size()
        coefficient, push = coefficient * scale, push * scale
    probs_TE = GuardedReLU.apply(logits_TE, map_TE, push)

    gates_TE = probs_TE.float()
    if regularization.balances:
        weight = num_experts / (regularization.topk * sequence_tokens * sequence_tokens)
        l1_loss = torch.sum(gates_TE.sum(dim=0) * active_E) * weight
    else:
        l1_loss = gates_TE.sum() / sequence_tokens

    with torch.no_grad():
        counts[: num_experts + 1] += own_counts
        counts[num_experts + 1].add_(l1_loss)
        counts[num_experts + 2].add_(1.0 / group.size())
    return MoEAuxLossAutoScaler.apply(probs_TE, coefficient * l1_loss), map_TE


def active(logits_TE: torch.Tensor, padding_mask_T: torch.Tensor | None) -> torch.Tensor:
    """Return the routing map: where logits are positive and tokens are no padding, bool `[T, E]`."""
    map_TE = logits_TE > 0
    return map_TE if padding_mask_T is None else map_TE & ~padding_mask_T.unsqueeze(-1)


def l1_coefficient(regularization: Regularization, exponent: torch.Tensor) -> torch.Tensor:
    """Return λ = init · multiplier^exponent as a float64 scalar on the device."""
    multiplier = torch.full_like(exponent, regularization.multiplier, dtype=torch.float64)
    return regularization.init * multiplier**exponent


class GuardedReLU(torch.autograd.Function):
    """ReLU whose gradient is `push` instead of 0 where it is off."""

    @staticmethod
    def forward(ctx: Any, logits_TE: torch.Tensor, map_TE: torch.Tensor, push: torch.Tensor) -> torch.Tensor:
        """Return the gates.

        Args:
            logits_TE: `[T, E]`.
            map_TE: bool `[T, E]`, where the result is not 0.
            push: one element, the gradient elsewhere, as that of a loss term; 0 makes it an ordinary ReLU.
        """
        ctx.save_for_backward(map_TE, push)
        return torch.where(map_TE, logits_TE, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        map_TE, push = ctx.saved_tensors
        push = push * MoEAuxLossAutoScaler.main_loss_backward_scale  # set by Megatron between forward and backward
        return torch.where(map_TE, gradient, push.to(gradient.dtype)), None, None


class TokenOrder(NamedTuple):
    """An `Order` by the token of each pair.

    Attributes:
        token_index_P: int64 `[P]`.
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
    """The `Order` of rows that are pairs already, sorted by expert: the identity."""

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        return tokens_TH

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return pairs_PH


def count(map_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the tokens of each expert.

    Args:
        map_TE: bool `[T, E]`.

    Returns:
        The counts, integers `[E]`, and what `plan` goes by.
    """
    counts_E = map_TE.sum(dim=0)
    return counts_E, counts_E


def plan(
    probs_TE: torch.Tensor, map_TE: torch.Tensor, counted: torch.Tensor, num_pairs: int
) -> tuple[TokenOrder, torch.Tensor]:
    """Sort the pairs by expert, without a host wait.

    Args:
        probs_TE: `[T, E]`, the gates.
        map_TE: bool `[T, E]`.
        counted: the second result of `count`.
        num_pairs: P, which the map has.

    Returns:
        The order, and the gates `[P]` of the type of `probs_TE`, through which gradients flow.
    """
    expert_index, token_index = torch.nonzero_static(map_TE.T, size=num_pairs).unbind(dim=1)
    gates_P = probs_TE.reshape(-1).gather(0, token_index * probs_TE.shape[1] + expert_index)
    return TokenOrder(token_index), gates_P


def activate(hidden: torch.Tensor, gates_P: torch.Tensor, end: torch.Tensor | None = None) -> torch.Tensor:
    """Return `gate · SiLU(left) ⊙ right`, `[P, F]`.

    Args:
        hidden: `[P, 2 * F]`, left and then right.
        gates_P: `[P]`.
        end: int32, one element: rows from here on belong to no pair. A backend may skip them; this one does not.
    """
    left, right = hidden.chunk(2, dim=-1)
    return silu(left).mul_(right).mul_(gates_P.unsqueeze(-1))


def activate_backward(
    hidden: torch.Tensor, gates_P: torch.Tensor, d_activated: torch.Tensor, end: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `activate`'s result again, and the gradients of its arguments.

    Args:
        hidden, gates_P, end: as above.
        d_activated: `[P, F]`, the result's gradient, whose memory is used up.
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


PYTORCH = Backend(relu_routing, count, plan, activate, activate_backward)
