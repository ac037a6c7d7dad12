"""The three ways to run a layer's experts, each a class with one method; a layer chooses one when it is built.

    InPlace     one rank has all experts      plan → experts(tokens, order): take → SwiGLU → sum
    ByExchange  all-to-all                    plan, take → dispatch → experts → combine → sum
    ByMegatron  allgather, HybridEP  preprocess → dispatch → experts → combine → postprocess

T tokens (sequence x batch), E experts, H hidden size.
"""

from typing import Protocol

import torch

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.remoe.layer.counting import Counts


class Way(Protocol):
    """A way to run the experts."""

    def run(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        """Return the sum of each token's experts.

        Args:
            hidden_states: `[sequence, batch, H]`.
            probs_TE: `[T, E]`, the gates.
            map_TE: bool `[T, E]`.
            counts: of this map; Megatron's dispatchers make their own.

        Returns:
            `[sequence, batch, H]`.
        """


class InPlace:
    """The experts take the tokens and sum the pairs themselves; nothing is sent."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer

    def run(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        order, gates_P = self.layer.backend.plan(probs_TE, map_TE, counts.counts_EB, counts.num_pairs)
        tokens_TH = hidden_states.view(-1, hidden_states.shape[-1])
        output, _ = self.layer.experts(tokens_TH, counts.tokens_per_expert, gates_P, order)
        return output.view_as(hidden_states)


class ByMegatron:
    """Megatron's dispatcher counts, permutes and sends the pairs."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer

    def run(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        layer = self.layer
        pairs_PH, gates_P = layer.preprocess(hidden_states, probs_TE, map_TE)
        output, _ = layer.routed_experts_compute(*layer.dispatch(pairs_PH, gates_P))
        return layer.postprocess(layer.combine(output), None)


class ByExchange(ByMegatron):
    """A `PlannedAlltoAllDispatcher` takes Megatron's steps with the counts of the layer."""

    def run(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: Counts
    ) -> torch.Tensor:
        self.layer.token_dispatcher.counts = counts
        return super().run(hidden_states, probs_TE, map_TE, counts)
