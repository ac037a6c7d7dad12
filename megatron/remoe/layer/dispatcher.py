"""All-to-all dispatch for a number of experts that varies from token to token.

T tokens on this rank, E experts in all, P pairs (of a token here and an expert that is active for it), H hidden size.
"""

from typing import Any

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.kernels.backend import Order, backend_of
from megatron.remoe.layer.plan import DispatchPlan, count_pairs, plan_dispatch


class PlannedAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher, with a planned permutation in place of its sort.

    The layer calls `permute`, Megatron's steps from `token_dispatch` to `token_combine`, and `unpermute`.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        self.backend = backend_of(config)
        self._plan: DispatchPlan | None = None

    def permute(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, plan: DispatchPlan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort tokens and gates by expert, and store the plan's sizes where Megatron's steps read them.

        Args:
            hidden_states: `[sequence, batch, H]`.
            probs_TE: `[T, E]`.
            plan: made for these tokens.

        Returns:
            `[P, H]` and `[P]`.
        """
        self.hidden_shape, self.probs = hidden_states.shape, probs_TE
        self.tokens_per_expert = plan.counts.tokens_per_expert
        if (exchange := plan.counts.exchange) is not None:
            self.input_splits, self.output_splits = exchange.sent.numpy(), exchange.received.numpy()
            self.output_splits_tp = exchange.gathered.numpy()
            self.num_global_tokens_per_local_expert = exchange.per_expert
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        return _Take.apply(hidden_states.view(-1, self.hidden_shape[-1]), plan.order), plan.gates_P

    def unpermute(self, pairs_PH: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
        """Sum each token's pairs.

        Args:
            pairs_PH: `[P, H]`, the experts' outputs.
            plan: that of `permute`.

        Returns:
            `[sequence, batch, H]`.
        """
        output = _Sum.apply(pairs_PH, plan.order, self.hidden_shape[:-1].numel()).view(self.hidden_shape)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output

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

    # Megatron's names of the first and the last step, for schedules that call a layer's steps one by one. As in its own
    # dispatchers, the first step keeps what the last one needs.

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count, plan and call `permute`."""
        (counts,) = count_pairs(routing_map, self, self.backend)
        self._plan = plan_dispatch(probs, routing_map, counts, self.backend)
        return self.permute(hidden_states, probs, self._plan)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Call `unpermute` with the plan of `dispatch_preprocess`."""
        plan, self._plan = self._plan, None
        assert plan is not None
        return self.unpermute(permutated_local_input_tokens, plan)


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
