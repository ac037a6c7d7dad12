"""All-to-all dispatch for a number of experts that varies from token to token."""

import torch

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class VariableTopkAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's all-to-all dispatcher without its assumption of exactly k experts per token.

    The base class permutes to `num_tokens * topk` pairs when no capacity is set: with more active pairs it silently
    drops the last experts' tokens, with fewer it sends pairs that were not routed. The allgather dispatcher takes the
    true number by itself.
    """

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Count the pairs.

        Args:
            routing_map: bool `[num_tokens, num_experts]`.

        Returns:
            int64 `[num_local_experts]`, the number of tokens for each local expert.
        """
        tokens_per_local_expert = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        # It sizes the permuted tensor, so the copy to the host that all counts share is waited for here.
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert
