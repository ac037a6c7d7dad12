"""All-to-all dispatch for a number of experts that varies from token to token."""

from typing import Any

import torch

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def count_pairs(routing_map: torch.Tensor, chunks: int, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """How many tokens each rank of `group` sends to each expert. Waits for the device, once.

    Args:
        routing_map: bool `[num_tokens, num_experts]`.
        chunks: into how many parts of about equal length the tokens are cut.
        group: of the ranks that exchange tokens; all of them have to call it.

    Returns:
        int64 `[ranks, chunks, num_experts]` on the host.
    """
    counts = torch.stack([part.sum(dim=0) for part in routing_map.tensor_split(chunks)])
    if group.size() > 1:
        counts = gather_from_sequence_parallel_region(counts, group=group)
    return counts.view(group.size(), chunks, -1).cpu()


class _SumOfRows(torch.autograd.Function):
    """`index_add`, of which PyTorch would keep the summands for the backward pass."""

    @staticmethod
    def forward(ctx: Any, summands: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return summands.new_zeros(num_rows, summands.shape[1]).index_add_(0, rows, summands)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


class VariableTopkAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher without its assumption of exactly k experts per token, without sorting.

    The base class permutes to `num_tokens * topk` pairs when no capacity is set: with more active pairs it silently
    drops the last experts' tokens, with fewer it sends pairs that were not routed. The allgather dispatcher takes the
    true number by itself.

    Attributes:
        fixed_topk: the number of experts of every token where it does not vary, as with top-k routers. One rank that
            has all experts then does not wait for the device.
        counts: of the routing map that was last planned, until it is dispatched: from `count_pairs`, for one chunk.
        experts_gather: the experts, all on one rank, pick their tokens by `rows` and give each token's sum.
        rows: int64 `[pairs]`, the token of each pair in the order of the experts.
    """

    fixed_topk: int | None = None
    num_out_tokens: int | torch.Tensor
    counts: torch.Tensor | None = None
    experts_gather = False
    rows: torch.Tensor

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Find out who sends how much to whom.

        Args:
            routing_map: bool `[num_tokens, num_experts]`.

        Returns:
            int64 `[num_local_experts]`, the number of tokens for each local expert; on the host, unless nothing was
            waited for.
        """
        if self.is_megatrons():
            tokens_per_local_expert = super().preprocess(routing_map)
            if not self.drop_and_pad:
                self.num_out_tokens = routing_map.sum()
                # It sizes the permuted tensor, so the copy to the host that all counts share is waited for here.
                self._maybe_update_cuda_sync_point("before_permutation_1")
            return tokens_per_local_expert
        if self.fixed_topk is not None and self.ep_size == self.tp_size == 1:
            self.num_out_tokens = len(routing_map) * self.fixed_topk
            return routing_map.sum(dim=0)
        planned, self.counts = self.counts, None
        counts = count_pairs(routing_map, 1, self.tp_ep_group) if planned is None else planned
        # The group's ranks go through tensor parallelism first.
        sent = counts.view(self.ep_size, self.tp_size, self.num_experts).transpose(0, 1)
        local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        received = sent[:, :, local]
        mine = sent[self.tp_rank, self.ep_rank]
        self.num_out_tokens = sum(mine.tolist())
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = mine.view(self.ep_size, -1).sum(dim=1).numpy()
            self.output_splits = received[self.tp_rank].sum(dim=1).numpy()
            self.output_splits_tp = received.sum(dim=(1, 2)).numpy()
        self.num_global_tokens_per_local_expert = received.reshape(-1, self.num_local_experts)
        return received.sum(dim=(0, 1))

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the tokens and gates into the order of the experts; the routing map has it already.

        Args:
            hidden_states: `[sequence, batch, hidden]`.
            routing_map: bool `[num_tokens, num_experts]`.
            probs: `[num_tokens, num_experts]`.

        Returns:
            `[pairs, hidden]`, or all tokens where the experts gather, and the gates, `[pairs]`.
        """
        if self.is_megatrons():
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        self.hidden_shape_before_permute = tokens.shape
        experts, self.rows = torch.nonzero_static(routing_map.T, size=int(self.num_out_tokens)).unbind(dim=1)
        gates = probs.reshape(-1).gather(0, self.rows * self.num_experts + experts)
        return tokens if self.experts_gather else tokens.index_select(0, self.rows), gates

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Megatron's; where one rank has all experts, the rows are in their order already."""
        if self.is_megatrons() or self.tp_size > 1 or self.ep_size > 1:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As Megatron's; where one rank has all experts, there is nothing to do."""
        if self.is_megatrons() or self.tp_size > 1 or self.ep_size > 1:
            return super().combine_preprocess(hidden_states)
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """Sum each token's rows.

        Args:
            permutated_local_input_tokens: `[pairs, hidden]`, the experts' outputs, or the sums where they gather.

        Returns:
            `[sequence, batch, hidden]`.
        """
        if self.is_megatrons():
            return super().combine_postprocess(permutated_local_input_tokens)
        output = permutated_local_input_tokens
        if not self.experts_gather:
            output = _SumOfRows.apply(output, self.rows, self.hidden_shape_before_permute[0])
        output = output.view(self.hidden_shape)
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output

    def is_megatrons(self) -> bool:
        """Whether what is set up needs Megatron's own permutation."""
        return bool(
            self.drop_and_pad or self.config.moe_permute_fusion or self.config.moe_router_padding_for_quantization
        )
