"""How many experts a model for transformers gives each token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.hf.modeling_remoe import RemoeSparseMoeBlock


@contextmanager
def counted_experts(model: RemoeForCausalLM) -> Iterator[dict[int, list[torch.Tensor]]]:
    """While it is open, count the active experts of every token, padding included.

    Yields:
        Layer's number from 1, of those with experts → a tensor for each forward pass, int64 `[tokens]`.
    """
    counts: dict[int, list[torch.Tensor]] = {}
    handles = []
    for number, layer in enumerate(model.model.layers, start=1):
        if not isinstance(layer.mlp, RemoeSparseMoeBlock):
            continue
        passes = counts[number] = []
        most = layer.mlp.width or model.config.num_experts

        def count(_router: object, _tokens: object, routed: tuple[torch.Tensor, ...], passes=passes, most=most) -> None:
            passes.append((routed[1] > 0).sum(dim=-1).clamp(max=most))

        handles.append(layer.mlp.gate.register_forward_hook(count))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
