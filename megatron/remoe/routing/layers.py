"""Find what belongs to each layer in a model of Megatron's modules."""

import itertools
from collections.abc import Iterable, Iterator

import torch

from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock


def layer_numbers(routers: Iterable[TopKRouter], modules: Iterable[torch.nn.Module], num_layers: int) -> list[int]:
    """Return each router's layer number, from 1.

    Layers of multi-token prediction, which Megatron numbers from 1 again, follow the decoder's.

    Args:
        routers: in the model's order.
        modules: the whole model on this rank.
        num_layers: layers of the decoder.
    """
    blocks = [module for module in modules if isinstance(module, MultiTokenPredictionBlock)]
    # In a hybrid model, routers do not know that they belong to multi-token prediction.
    predicting = {id(module) for block in blocks for module in block.modules()}
    after = itertools.count(num_layers + 1)
    return [next(after) if id(router) in predicting else router.layer_number for router in routers]


def norm_weights(modules: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    """Yield the trained vectors of PyTorch's, Megatron's and Transformer Engine's norms, fused ones included."""
    norms: tuple[type, ...] = (torch.nn.LayerNorm, torch.nn.RMSNorm, FusedLayerNorm)
    if transformer_engine.HAVE_TE:
        engine = transformer_engine.te.pytorch
        norms += (engine.LayerNorm, engine.RMSNorm, engine.LayerNormLinear)
    for module in modules:
        if isinstance(module, norms):
            vectors = (parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 1)
            yield from (vector for vector in vectors if vector.requires_grad)
