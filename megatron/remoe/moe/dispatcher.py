"""All-to-all dispatch for a number of experts that varies from token to token."""

from typing import Any

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.kernels import wants_kernels
from megatron.remoe.local.swiglu import Order, sum_pairs, take
from megatron.remoe.moe.plan import DispatchPlan, Ranks, count_pairs, plan_dispatch


class _TakenRows(torch.autograd.Function):
    """`index_select`, whose gradient PyTorch would add up in the tokens' type."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.save_for_backward(*order)
        ctx.num_tokens = len(tokens)
        return take(tokens, order.token_index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_pairs(gradient, Order(*ctx.saved_tensors), ctx.num_tokens), None


class _SumOfRows(torch.autograd.Function):
    """`index_add`, of which PyTorch would keep the summands for the backward pass."""

    @staticmethod
    def forward(ctx: Any, summands: torch.Tensor, order: Order, num_tokens: int) -> torch.Tensor:
        ctx.save_for_backward(order.token_index)
        return sum_pairs(summands, order, num_tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return take(gradient, *ctx.saved_tensors), None, None


class PlannedAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher by a plan that has the pairs in the experts' order: nothing is sorted.

    The layer hands the plan over. Megatron's schedules that call a layer's steps one by one have none: then it is made
    here, and kept until the tokens are combined.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        self.ranks, self.kernels = Ranks.of(pg_collection), wants_kernels(config)
        self._plan: DispatchPlan | None = None

    def dispatch_preprocess(
        self,
        hidden_states: torch.Tensor,
        routing_map: torch.Tensor,
        probs: torch.Tensor,
        plan: DispatchPlan | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the tokens and gates into the order of the experts.

        Args:
            hidden_states: `[sequence, batch, hidden]`.
            routing_map: bool `[num_tokens, num_experts]`.
            probs: `[num_tokens, num_experts]`.
            plan: of this routing map; None makes one.

        Returns:
            `[pairs, hidden]` and `[pairs]`.
        """
        if plan is None:
            counts = count_pairs(routing_map, 1, self.ranks, self.kernels)[0]
            plan = self._plan = plan_dispatch(probs, routing_map, counts, self.ranks, self.kernels)
        # What Megatron's steps between this and the sum go by.
        self.hidden_shape, self.probs = hidden_states.shape, probs
        self.tokens_per_expert = plan.tokens_per_expert
        if plan.exchange is not None:
            self.input_splits, self.output_splits = plan.exchange.sent.numpy(), plan.exchange.received.numpy()
            self.output_splits_tp = plan.exchange.gathered.numpy()
            self.num_global_tokens_per_local_expert = plan.exchange.per_expert
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        return _TakenRows.apply(tokens, plan.order), plan.gates

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Megatron's; where one rank has all experts, the rows are in their order already."""
        if self.ranks.is_alone:
            return global_input_tokens, self.tokens_per_expert, global_probs
        return super().dispatch_postprocess(global_input_tokens, global_probs)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As Megatron's; where one rank has all experts, there is nothing to do."""
        return hidden_states if self.ranks.is_alone else super().combine_preprocess(hidden_states)

    def combine_postprocess(
        self, permutated_local_input_tokens: torch.Tensor, plan: DispatchPlan | None = None
    ) -> torch.Tensor:
        """Sum each token's rows.

        Args:
            permutated_local_input_tokens: `[pairs, hidden]`, the experts' outputs.
            plan: by which they were dispatched, if one was given then.

        Returns:
            `[sequence, batch, hidden]`.
        """
        if plan is None:
            plan, self._plan = self._plan, None
        assert plan is not None
        sums = _SumOfRows.apply(permutated_local_input_tokens, plan.order, self.hidden_shape[:-1].numel())
        output = sums.view(self.hidden_shape)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output
