"""Count how a model routes its tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron.remoe.hf import RemoeForCausalLM

from ...console.display import Display
from ..measuring import compute_logits, watch_routers
from ..text import read_batches

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset


class Counts:
    """Sums over tokens, for D data sets, L layers with experts, E experts, V tokens of the vocabulary.

    Args:
        layers: numbers of the layers, from 1. `[L]`
        domains: D.
        experts: E.
        vocabulary: V.
    """

    def __init__(self, layers: Sequence[int], domains: int, experts: int, vocabulary: int) -> None:
        zeros, number = partial(torch.zeros, dtype=torch.int64), len(layers)
        self.layers = [*layers]
        self.routed = zeros(domains, number, experts)  # pairs of a token and an active expert
        self.histogram = zeros(domains, number, experts + 1)  # tokens with 0, 1, 2, ... experts
        self.by_token = zeros(number, vocabulary, experts, dtype=torch.int32)
        self.occurrences = zeros(vocabulary)

    @property
    def tokens(self) -> torch.Tensor:
        """Return the number of tokens of each data set, int64 `[D]`."""
        return self.histogram[:, 0].sum(dim=-1)

    def add(self, domain: int, ids: torch.Tensor, place: int, active: torch.Tensor) -> None:
        """Count the routing of some tokens in one layer.

        Args:
            domain: the data set's place.
            ids: int64 `[tokens]`.
            place: the layer's place among those with experts.
            active: bool `[tokens, experts]`.
        """
        self.routed[domain, place] += active.sum(dim=0)
        self.histogram[domain, place] += torch.bincount(active.sum(dim=-1), minlength=active.shape[-1] + 1)
        self.by_token[place].index_add_(0, ids, active.int())
        if place == 0:
            self.occurrences += torch.bincount(ids, minlength=len(self.occurrences))


@torch.inference_mode()
def count_routing(
    model: RemoeForCausalLM, texts: Sequence["GPTDataset"], layers: list[int], most: int | None, display: Display
) -> Counts:
    """Run the model over at most `most` sequences of each domain's text, and return its counts."""
    counts = Counts(layers, len(texts), model.config.num_experts, model.config.vocab_size)
    seen: list[torch.Tensor] = []
    with watch_routers(model, lambda _number, active: seen.append(active.cpu())):
        for domain, text in enumerate(texts):
            with display.step(Path(text.dataset_path).name, min(len(text), most or len(text))):
                for batch in read_batches(text, most, model.config.vocab_size):
                    ids = batch[:, :-1]
                    compute_logits(model, ids.to(model.device))
                    for place, active in enumerate(seen):
                        counts.add(domain, ids.flatten(), place, active)
                    seen.clear()
                    display.advance(len(batch))
    return counts
