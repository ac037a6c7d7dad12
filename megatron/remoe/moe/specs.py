"""Replace routers, MoE layers, experts, attention and norms in Megatron's layer specifications."""

from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.remoe.local.attention import FusedDotProductAttention
from megatron.remoe.local.experts import build_experts
from megatron.remoe.local.norm import SequenceParallelTorchNorm
from megatron.remoe.moe.engine_experts import EngineExperts
from megatron.remoe.moe.layer import ReMoELayer
from megatron.remoe.routing.router import ReLURouter

type LayerSpec = ModuleSpec | TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules


def with_relu_routing(spec: LayerSpec) -> LayerSpec:
    """Return a copy of `spec` in which every MoE layer routes by ReLU; see `with_router`."""
    return with_router(spec, ReLURouter)


def with_router(spec: LayerSpec, router: type[TopKRouter]) -> LayerSpec:
    """Return a copy of `spec` in which every MoE layer takes any routing map and has this router; dense layers stay.

    Args:
        spec: of one layer, of a block of layers (of multi-token prediction too), or of a hybrid stack.
        router: the class of the router.

    Raises:
        TypeError: a layer's MLP is neither dense nor built from Megatron's `MoELayer`.
    """
    if isinstance(spec, TransformerBlockSubmodules | MultiTokenPredictionBlockSubmodules):
        return replace(spec, layer_specs=[with_router(layer_spec, router) for layer_spec in spec.layer_specs or []])
    if isinstance(spec.submodules, HybridStackSubmodules):
        moe_layer = with_router(spec.submodules.moe_layer, router)
        return replace(spec, submodules=replace(spec.submodules, moe_layer=moe_layer))
    if isinstance(spec.submodules, MultiTokenPredictionLayerSubmodules):
        layer = with_router(spec.submodules.mtp_model_layer, router)
        return replace(spec, submodules=replace(spec.submodules, mtp_model_layer=layer))
    return replace(spec, submodules=replace(spec.submodules, mlp=_routed_mlp(spec.submodules.mlp, router)))


def _routed_mlp(mlp: Any, router: type[TopKRouter]) -> Any:
    if isinstance(mlp, ModuleSpec):
        builder, submodules = mlp.module, mlp.submodules
    elif isinstance(mlp, partial):
        builder, submodules = mlp.func, mlp.keywords.get("submodules")
    else:
        builder, submodules = mlp, None
    if not hasattr(submodules, "router"):
        return mlp
    if builder not in (MoELayer, ReMoELayer):
        raise TypeError(f"{router.__name__} needs an MLP built from MoELayer, this specification has {builder!r}.")
    return partial(ReMoELayer, submodules=replace(submodules, router=router))


def with_sequence_parallel_norms(spec: Any) -> Any:
    """Return a copy of `spec` whose PyTorch norms may run under sequence parallelism; other norms stay.

    Args:
        spec: a specification of a block or layer, or any part of one.
    """
    return _replaced(spec, {WrappedTorchNorm: SequenceParallelTorchNorm})


def with_fused_layers(spec: Any) -> Any:
    """Return a copy of `spec` whose local attention and experts use PyTorch's fused kernels.

    Dense layers, layers of Transformer Engine, and routers stay.

    Args:
        spec: a specification of a block or layer, or any part of one.
    """
    return _replaced(
        spec, {DotProductAttention: FusedDotProductAttention, MoELayer: ReMoELayer, SequentialMLP: build_experts}
    )


def with_engine_kernels(spec: Any) -> Any:
    """Return a copy of `spec` whose MoE layers and Transformer Engine experts take `--moe-kernels`.

    Args:
        spec: a specification of a block or layer, or any part of one.
    """
    return _replaced(spec, {MoELayer: ReMoELayer, TEGroupedMLP: EngineExperts})


def _replaced(spec: Any, classes: dict[Any, Any]) -> Any:
    """Return a copy of a specification in which the keys of `classes` are replaced by their values."""
    if isinstance(spec, type):
        return classes.get(spec, spec)
    if isinstance(spec, list):
        return [_replaced(item, classes) for item in spec]
    if isinstance(spec, dict):
        return {name: _replaced(value, classes) for name, value in spec.items()}
    if isinstance(spec, partial):
        if spec.func is SequentialMLP:
            return partial(classes[SequentialMLP], stock=spec) if SequentialMLP in classes else spec
        keywords = {name: _replaced(value, classes) for name, value in spec.keywords.items()}
        return partial(_replaced(spec.func, classes), *spec.args, **keywords)
    if is_dataclass(spec) and not isinstance(spec, type):
        changed = {field.name: _replaced(getattr(spec, field.name), classes) for field in fields(spec)}
        return replace(spec, **changed)
    return spec
