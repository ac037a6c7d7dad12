"""Check weights under the names of transformers, and load them into a model."""

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ...console.errors import ConversionError

Tensors = dict[str, torch.Tensor]


def shapes_of(config: RemoeConfig) -> dict[str, torch.Size]:
    """Return name → shape of each stored tensor of a model."""
    with torch.device("meta"):
        state = RemoeForCausalLM(config).state_dict()
    return {
        name: tensor.shape
        for name, tensor in state.items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def check_tensors(source: Path, shapes: dict[str, torch.Size], tensors: Tensors) -> Tensors:
    """Return the tensors after a comparison with the expected shapes; `source` is named in errors.

    Raises:
        ConversionError: one has another shape, or holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ConversionError(
                f"{source}: {name} has the shape {list(tensor.shape)}, and its configuration calls for "
                f"{list(shapes[name])}."
            )
        if not tensor.isfinite().all():
            raise ConversionError(f"{source}: {name} holds values that are not finite. Choose an earlier checkpoint.")
    return tensors


@torch.no_grad()
def model_of(config: RemoeConfig, parts: Iterator[Tensors], dtype: torch.dtype | None = None) -> RemoeForCausalLM:
    """Build a model with these checked weights, for evaluation; by default in the dtype of the configuration."""
    model = RemoeForCausalLM._from_config(config, dtype=dtype or config.dtype or torch.float32).eval()
    state = model.state_dict()
    for part in parts:
        for name, tensor in part.items():
            state[name].copy_(tensor)
    return model
