"""All-to-all dispatch for a number of experts that varies from token to token.

Megatron's dispatcher with the fix of docs/upstream.md has the same results. But with an activation limit the host waits
more often for the device, because Megatron counts each chunk again in the forward and the backward pass. Megatron's
permutation also sorts T · E booleans, and sums each token's experts in bf16, where a GPU rounds each addition.

T tokens on this rank, E experts in all, P pairs (of a token here and an expert that is active for it), H hidden size.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.remoe.kernels.backend import choose_backend
from megatron.remoe.kernels.interface import Order
from megatron.remoe.layer.counting import ChunkCounts, count_pairs


class PlannedAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, with sizes that are counted in advance and a planned order instead of a sort.

    Attributes:
        counts: the counts of the next tokens, set by the layer. If None, the dispatcher counts the pairs itself, for
            schedules that call a layer's steps one by one.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.backend = choose_backend(self.config)
        self.counts: ChunkCounts | None = None
        self._order: Order | None = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort tokens and gates by expert, and store the sizes where Megatron's next steps read them.

        Args:
            hidden_states: `[sequence, batch, H]`.
            routing_map: bool `[T, E]`.
            probs: `[T, E]`.

        Returns:
            Each pair's token `[P, H]` and gate `[P]`, sorted by expert.
        """
        counts = self.counts or count_pairs(routing_map, None, self, self.backend)[0]
        self.counts = None
        self._order, gates_P = self.backend.plan(probs, routing_map, counts.counts_EB, counts.num_pairs)
        self.hidden_shape, self.probs = hidden_states.shape, probs
        self.tokens_per_expert = counts.tokens_per_expert
        self.input_splits, self.output_splits = counts.sent.numpy(), counts.received.numpy()
        self.output_splits_tp, self.num_global_tokens_per_local_expert = counts.gathered.numpy(), counts.per_rank
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        return _Take.apply(hidden_states.view(-1, self.hidden_shape[-1]), self._order), gates_P

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sort by local expert as Megatron does; if one rank has all experts, the rows are sorted already."""
        if self.tp_ep_group.size() == 1:
            return global_input_tokens, self.tokens_per_expert, global_probs
        return super().dispatch_postprocess(global_input_tokens, global_probs)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo `dispatch_postprocess`."""
        return hidden_states if self.tp_ep_group.size() == 1 else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Sum each token's pairs, `[P, H]` → `[sequence, batch, H]`, and add the overlapped shared experts."""
        order, self._order = self._order, None
        assert order is not None
        num_tokens = self.hidden_shape[:-1].numel()
        output = _Sum.apply(permutated_local_input_tokens, order, num_tokens).view(self.hidden_shape)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output


class _Take(torch.autograd.Function):
    """`order.take` whose gradient is summed by `order.sum`; PyTorch would sum it in the tokens' type."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.save_for_backward(*order)
        ctx.order_type, ctx.num_tokens = type(order), len(tokens_TH)
        return order.take(tokens_TH)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.order_type(*ctx.saved_tensors).sum(gradient, ctx.num_tokens), None


class _Sum(torch.autograd.Function):
    """`order.sum` that saves no summands for the backward pass."""

    @staticmethod
    def forward(ctx: Any, pairs_PH: torch.Tensor, order: Order, num_tokens: int) -> torch.Tensor:
        ctx.save_for_backward(*order)
        ctx.order_type = type(order)
        return order.sum(pairs_PH, num_tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.order_type(*ctx.saved_tensors).take(gradient), None, None
