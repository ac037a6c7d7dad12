"""Count the experts per token of a model for transformers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.hf.modeling_remoe import RemoeSparseMoeBlock


def summarize_experts(histogram: torch.Tensor) -> dict[str, Any]:
    """Summarize the experts per token of a layer.

    Args:
        histogram: int64 `[E + 1]`, the number of tokens with 0, 1, 2, ... experts.

    Returns:
        "mean", "percentile_99" and "largest" number of experts, and the number of "tokens".
    """
    tokens = int(histogram.sum())
    share = histogram.cumsum(0) / tokens
    return {
        "mean": float((histogram * torch.arange(len(histogram))).sum() / tokens),
        "percentile_99": int((share >= 0.99).nonzero()[0]),
        "largest": int(histogram.nonzero()[-1]),
        "tokens": tokens,
    }


def expert_blocks(model: RemoeForCausalLM) -> dict[int, RemoeSparseMoeBlock]:
    """Return the number of each layer with experts, from 1 → its experts."""
    layers = enumerate(model.model.layers, start=1)
    return {number: layer.mlp for number, layer in layers if isinstance(layer.mlp, RemoeSparseMoeBlock)}


@contextmanager
def count_experts(model: RemoeForCausalLM) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Count the active experts of every token, including padding, in the block's forward passes.

    Yields:
        Number of each layer with experts, from 1 → a tensor for each forward pass, int64 `[tokens]`.
    """
    counts: dict[int, list[torch.Tensor]] = {}
    with ExitStack() as hooks:
        for number, block in expert_blocks(model).items():
            passes = counts[number] = []

            def count(_router: object, _tokens: object, routed: tuple[torch.Tensor, ...], passes=passes) -> None:
                passes.append((routed[1] > 0).sum(dim=-1))

            hooks.enter_context(block.gate.register_forward_hook(count))
        yield counts
