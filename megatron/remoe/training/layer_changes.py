"""Change the layer specification of a model, whatever its kind."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.remoe.layer.specs import LayerSpec
from megatron.remoe.transformer.hybrid import local_hybrid_stack_spec
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from megatron.training.models.hybrid import HybridModelConfig

type ModelConfig = GPTModelConfig | HybridModelConfig


def change_layers(model_cfg: ModelConfig, change: Callable[[LayerSpec, int | None], LayerSpec]) -> None:
    """Apply `change` to the layers of the model: the caller's specification, or Megatron's default."""
    if isinstance(model_cfg, HybridModelConfig):
        spec = model_cfg.hybrid_stack_spec
        if spec is None and model_cfg.transformer.transformer_impl == "local":
            spec = local_hybrid_stack_spec(model_cfg.transformer, model_cfg.hybrid_layer_pattern)
        model_cfg.hybrid_stack_spec = change(spec or hybrid_stack_spec, None)
        return
    model_cfg.transformer_layer_spec = _changed_spec(model_cfg.transformer_layer_spec or default_layer_spec, change)
    if model_cfg.transformer.mtp_num_layers:
        model_cfg.pre_wrap_hooks.append(partial(rebuild_prediction_layers, change))


def _changed_spec(given: Any, change: Callable[[LayerSpec, int | None], LayerSpec]) -> Callable[..., LayerSpec]:
    """Return a builder of the specification `given`, or of the one that it builds, with `change` applied."""

    def build(model_cfg: ModelConfig, vp_stage: int | None = None) -> LayerSpec:
        if isinstance(given, ModuleSpec | TransformerBlockSubmodules):
            spec = given
        elif "vp_stage" in inspect.signature(given).parameters:
            spec = given(model_cfg, vp_stage=vp_stage)
        else:
            spec = given(model_cfg)
        return change(spec, vp_stage)

    return build


def rebuild_prediction_layers(change: Callable[[Any, int | None], Any], model_chunks: list[Any]) -> list[Any]:
    """Rebuild GPTModel's layers of multi-token prediction in a pre-wrap hook: no setting of Megatron changes them.

    Args:
        change: takes a block's submodules and the virtual pipeline stage; returns the changed submodules.
        model_chunks: the model on this rank, as Megatron built it; changed in place and returned.
    """
    for chunk in model_chunks:
        if chunk.mtp_process:
            submodules = change(chunk.mtp.submodules, chunk.vp_stage)
            chunk.mtp = MultiTokenPredictionBlock(chunk.config, submodules, chunk.vp_stage, chunk.pg_collection)
    return model_chunks
