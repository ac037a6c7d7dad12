"""Replace routers, MoE layers, experts, attention and norms in Megatron's layer specifications.

A `spec` is a specification of a block or layer, or any part of one.
"""

import operator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.remoe.layer.experts import build_experts
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.transformer.attention import FusedDotProductAttention
from megatron.remoe.transformer.norm import build_sequence_parallel_norm

# Classes for `replace_classes`.
SEQUENCE_PARALLEL_NORMS = {WrappedTorchNorm: build_sequence_parallel_norm}
REMOE_LAYER = {MoELayer: ReMoELayer}  # supports --moe-kernels; keeps routers and experts

type LayerSpec = ModuleSpec | TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules


def with_router(spec: LayerSpec, router: type[TopKRouter] = ReLURouter) -> LayerSpec:
    """Return a copy of `spec` in which every MoE layer is a `ReMoELayer` with this router; dense layers stay the same.

    Args:
        spec: specification of a layer, a block of layers, a multi-token prediction block or a hybrid stack.
        router: the class of the router.

    Raises:
        TypeError: a part of `spec` has a router but is not built from Megatron's `MoELayer`.
    """
    return replace_classes(spec, REMOE_LAYER, router)


def with_fused_layers(spec: Any) -> Any:
    """Return a copy of `spec` whose local attention and experts use PyTorch's fused kernels.

    Dense MLPs, Transformer Engine's layers and routers stay the same.

    Args:
        spec: specification of a block or layer, or any part of one.
    """
    local = {DotProductAttention: FusedDotProductAttention, SequentialMLP: build_experts}
    return replace_classes(spec, REMOE_LAYER | local)


def replace_classes(spec: Any, classes: dict[Any, Any], router: type[TopKRouter] | None = None) -> Any:
    """Return a copy of `spec` in which the keys of `classes` are replaced by their values; other parts are shared.

    Args:
        spec: specification of a block or layer, or any part of one.
        classes: old class → new class.
        router: new router class of all MoE layers; None to keep theirs. With one, raises as `with_router` does.
    """
    if isinstance(spec, type):
        return classes.get(spec, spec)
    if isinstance(spec, list):
        items = [replace_classes(item, classes, router) for item in spec]
        return spec if all(map(operator.is_, items, spec)) else items
    if isinstance(spec, dict):
        values = replace_classes([*spec.values()], classes, router)
        return spec if all(map(operator.is_, values, spec.values())) else dict(zip(spec, values, strict=True))
    if isinstance(spec, partial):
        if spec.func is SequentialMLP:
            return partial(classes[SequentialMLP], stock=spec) if SequentialMLP in classes else spec
        _check_layer(spec.func, spec.keywords.get("submodules"), router)
        func, keywords = replace_classes(spec.func, classes), replace_classes(spec.keywords, classes, router)
        return spec if func is spec.func and keywords is spec.keywords else partial(func, *spec.args, **keywords)
    if is_dataclass(spec) and not isinstance(spec, type):
        if isinstance(spec, ModuleSpec):
            _check_layer(spec.module, spec.submodules, router)
        given = {field.name: getattr(spec, field.name) for field in fields(spec)}
        changed = replace_classes(given, classes, router)
        if router is not None and hasattr(spec, "router"):
            changed = changed | {"router": router}
        return spec if changed is given else replace(spec, **changed)
    return spec


def _check_layer(builder: Any, submodules: Any, router: type[TopKRouter] | None) -> None:
    if router is not None and hasattr(submodules, "router") and builder not in (MoELayer, ReMoELayer):
        raise TypeError(f"{router.__name__} needs an MLP built from MoELayer, this specification has {builder!r}.")
