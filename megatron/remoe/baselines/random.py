"""Random routing, as THOR trains (Zuo et al., arXiv 2110.04260): shows what experts gain without a router."""

import torch

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.remoe.baselines.unlearned import UnlearnedRouter


class RandomRouter(UnlearnedRouter):
    """Draws a token's experts in each forward pass, in evaluation too."""

    def draw(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Draw as `UnlearnedRouter.draw`, uniformly.

        The generator differs between ranks, and recomputation resets it.
        """
        num_tokens = hidden_states.shape[:-1].numel()
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return torch.rand(num_tokens, self.num_experts, device=hidden_states.device)
