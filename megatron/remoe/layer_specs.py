"""Puts the ReLU router and its MoE layer, and norms for sequence parallelism, into Megatron's layer specifications."""

from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.remoe.moe_layer import ReMoELayer
from megatron.remoe.norm import SequenceParallelTorchNorm
from megatron.remoe.router import ReLURouter

type LayerSpec = ModuleSpec | TransformerBlockSubmodules


def with_relu_routing(spec: LayerSpec) -> LayerSpec:
    """A copy of `spec` in which every MoE layer routes by ReLU; dense layers stay as they are.

    Args:
        spec: one transformer layer's specification, or that of a block of layers.

    Raises:
        TypeError: a layer's MLP is neither dense nor built from Megatron's `MoELayer`.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[with_relu_routing(layer_spec) for layer_spec in spec.layer_specs or []])
    return replace(spec, submodules=replace(spec.submodules, mlp=_relu_mlp(spec.submodules.mlp)))


def _relu_mlp(mlp: Any) -> Any:
    if isinstance(mlp, ModuleSpec):
        builder, submodules = mlp.module, mlp.submodules
    elif isinstance(mlp, partial):
        builder, submodules = mlp.func, mlp.keywords.get("submodules")
    else:
        builder, submodules = mlp, None
    if not hasattr(submodules, "router"):
        return mlp
    if builder not in (MoELayer, ReMoELayer):
        raise TypeError(f"ReLU routing needs an MLP built from MoELayer, this specification has {builder!r}.")
    return partial(ReMoELayer, submodules=replace(submodules, router=ReLURouter))


def with_sequence_parallel_norms(spec: Any) -> Any:
    """A copy of `spec` in which PyTorch's norms may run under sequence parallelism; others stay as they are.

    Args:
        spec: a specification of a block or layer, or any part of one.
    """
    if spec is WrappedTorchNorm:
        return SequenceParallelTorchNorm
    if isinstance(spec, list):
        return [with_sequence_parallel_norms(item) for item in spec]
    if is_dataclass(spec) and not isinstance(spec, type):
        changed = {field.name: with_sequence_parallel_norms(getattr(spec, field.name)) for field in fields(spec)}
        return replace(spec, **changed)
    return spec
