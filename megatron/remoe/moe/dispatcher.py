"""All-to-all dispatch for a number of experts that varies from token to token."""

from typing import Any

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.kernels import wants_kernels
from megatron.remoe.local.swiglu import add_pairs
from megatron.remoe.moe.plan import DispatchPlan, Ranks, count_pairs, plan_dispatch


def _sum_of_rows(
    summands: torch.Tensor, rows: torch.Tensor, by_token: torch.Tensor | None, num_rows: int
) -> torch.Tensor:
    """`[pairs, hidden]` → `[num_rows, hidden]`, added up in fp32 at least."""
    if by_token is not None:
        from megatron.remoe.kernels.rows import sum_rows

        return sum_rows(summands, by_token)
    dtype = torch.promote_types(summands.dtype, torch.float32)
    return add_pairs(summands.new_zeros(num_rows, summands.shape[1], dtype=dtype), rows, summands).to(summands.dtype)


class _TakenRows(torch.autograd.Function):
    """`index_select`, whose gradient PyTorch would add up in the tokens' type."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, rows: torch.Tensor, by_token: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(rows, by_token)
        ctx.num_rows = len(tokens)
        return tokens.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, by_token = ctx.saved_tensors
        return _sum_of_rows(gradient, rows, by_token, ctx.num_rows), None, None


class _SumOfRows(torch.autograd.Function):
    """`index_add`, of which PyTorch would keep the summands for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, summands: torch.Tensor, rows: torch.Tensor, by_token: torch.Tensor | None, num_rows: int
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return _sum_of_rows(summands, rows, by_token, num_rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None, None


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
        return _TakenRows.apply(tokens, plan.token_index, plan.by_token), plan.gates

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
        order, num_tokens = (plan.token_index, plan.by_token), self.hidden_shape[:-1].numel()
        output = _SumOfRows.apply(permutated_local_input_tokens, *order, num_tokens).view(self.hidden_shape)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output
