"""Install routers and local layers into Megatron's loop through its public hooks."""

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.utils import get_model_config
from megatron.remoe.baselines import ROUTERS
from megatron.remoe.baselines.hash import pass_token_ids
from megatron.remoe.files.errors import UsageError
from megatron.remoe.kernels.backend import wants_kernels
from megatron.remoe.layer.experts import supports_grouped_experts
from megatron.remoe.layer.specs import (
    REMOE_LAYER,
    SEQUENCE_PARALLEL_NORMS,
    LayerSpec,
    replace_classes,
    with_fused_layers,
    with_router,
)
from megatron.remoe.patches import apply_patches
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.training.arguments import model_config_from_args
from megatron.remoe.training.metrics import ReMoEMetricsTracker
from megatron.remoe.training.pairs import PairCounter
from megatron.remoe.transformer.hybrid import local_hybrid_stack_spec
from megatron.training.models.base import compose_hooks
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from megatron.training.models.hybrid import HybridModelConfig

type ModelConfig = GPTModelConfig | HybridModelConfig


def install_routing(args: argparse.Namespace, model_cfg: ModelConfig) -> None:
    """Install the router that the flags ask for, and its hooks. Without such a flag, keep Megatron's router.

    The hooks update λ or a baseline's state after each step, log the figures, set the k of --moe-warmup-topk, and pass
    token ids to --moe-baseline-router hash. With these routers, the patches are applied too. With Megatron's router,
    --moe-per-layer-logging counts its pairs, except in CUDA graphs.

    Args:
        args: arguments from `checked_arguments`.
        model_cfg: built with `transformer_config_from_args`; its layer specification may be the caller's own.

    Raises:
        TypeError: the configuration's class is wrong, or MoE layers do not fit (at the latest when they are built).
    """
    router: type[TopKRouter]
    post_wrap_hook: Callable[[list[torch.nn.Module]], list[torch.nn.Module]]
    config = model_cfg.transformer
    if args.moe_relu_routing:
        router = ROUTERS[args.moe_baseline_router] if args.moe_baseline_router else ReLURouter
        post_wrap_hook = partial(_update_each_step, args, partial(SparsityController, config=config))
    elif args.moe_warmup_topk is not None:
        router, post_wrap_hook = TopKRouter, partial(_install_warmup, args)
    elif args.moe_baseline_router is not None:
        router, post_wrap_hook = ROUTERS[args.moe_baseline_router], partial(_update_each_step, args, PairCounter)
    else:
        if args.num_experts and args.moe_per_layer_logging and args.cuda_graph_impl == "none":
            model_cfg.post_wrap_hooks.append(partial(_update_each_step, args, PairCounter))
        return
    if not isinstance(config, ReMoEConfig):
        raise TypeError(
            f"{router.__name__} needs a ReMoEConfig, got {type(config).__name__}: build the model's configuration "
            "with transformer_config_from_args(args)."
        )
    apply_patches(saves=bool(args.save))
    _change_layers(model_cfg, lambda spec, _vp_stage: with_router(spec, router))
    if args.moe_baseline_router == "hash":
        model_cfg.pre_wrap_hooks.append(pass_token_ids)
    model_cfg.post_wrap_hooks.append(post_wrap_hook)


def _update_each_step(
    args: argparse.Namespace,
    make: Callable[[list[torch.nn.Module]], SparsityController | PairCounter],
    model_chunks: list[torch.nn.Module],
) -> list[torch.nn.Module]:
    """Build the counter of the routers' pairs, call its `update` after each step, and log its figures.

    `SparsityController.update` moves λ.
    """
    counter, config = make(model_chunks), get_model_config(model_chunks[0])
    finalize = config.finalize_model_grads_func or finalize_model_grads  # Megatron's default, set later

    def finalize_and_update(*hook_args: Any, **hook_kwargs: Any) -> None:
        # Schedules call this after the last backward pass of a training step, and never in evaluation.
        finalize(*hook_args, **hook_kwargs)
        counter.update()

    config.finalize_model_grads_func = finalize_and_update
    _restore_for_reruns(counter)
    set_moe_metrics_tracker(ReMoEMetricsTracker(args, counter))
    return model_chunks


def _restore_for_reruns(counter: SparsityController | PairCounter) -> None:
    """Restore the counter's state when Megatron runs a step again: the step sees the same λ, and moves it once."""
    machine = get_rerun_state_machine()
    if (save := machine.state_save_func) is None or (restore := machine.state_restore_func) is None:
        return
    state = [buffer for router in counter.routers for buffer in router.buffers()] + [counter.running_sums]
    kept = [tensor.clone() for tensor in state]

    def save_with_state() -> Any:
        torch._foreach_copy_(kept, state)
        return save()

    def restore_with_state(saved: Any) -> None:
        torch._foreach_copy_(state, kept)
        restore(saved)

    machine.state_save_func, machine.state_restore_func = save_with_state, restore_with_state


def _install_warmup(args: argparse.Namespace, model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Use --moe-warmup-topk experts per token in the first --moe-warmup-steps steps, the paper's near-dense warm-up."""

    def set_topk(router: TopKRouter, _inputs: Any) -> None:
        # Megatron sets `iteration` when it loads a checkpoint, and `curr_iteration` at each step. An evaluation uses
        # the k of the step before it.
        step = max(args.iteration, getattr(args, "curr_iteration", 0))
        router.topk = args.moe_warmup_topk if step < args.moe_warmup_steps else args.moe_router_topk

    for module in (module for chunk in model_chunks for module in chunk.modules()):
        if isinstance(module, TopKRouter):
            module.register_forward_pre_hook(set_topk)
    return model_chunks


def install_local_layers(args: argparse.Namespace, model_cfg: ModelConfig) -> None:
    """Install layers with PyTorch's fused kernels for --transformer-impl local, for any routing.

    With --no-local-layer-fusion only the norms change, and only for sequence parallelism. With Transformer Engine only
    the MoE layers change, and only with --moe-kernels.

    Args:
        args: arguments from `checked_arguments`. The data loader's causal attention mask is turned off if the
            fused kernels do not need it.
        model_cfg: its layer specification may be the caller's own.

    Raises:
        UsageError: a setting does not work with these layers.
    """
    if args.transformer_impl != "local":
        if wants_kernels(args):
            _change_layers(model_cfg, lambda spec, _vp_stage: replace_classes(spec, REMOE_LAYER))
        return
    if args.multi_latent_attention:
        raise UsageError("--multi-latent-attention: needs --transformer-impl transformer_engine.", "REMOE-E209")
    stacks_experts = args.num_experts and args.local_layer_fusion and supports_grouped_experts(model_cfg.transformer)
    # core/optimizer/emerging_optimizers.py: _is_nonlinear_or_embedding.
    if stacks_experts and args.optimizer not in ("adam", "sgd"):
        raise UsageError(
            f"--optimizer {args.optimizer} would train the experts of --transformer-impl local with Adam: it takes "
            "two-dimensional weights, and theirs are stacked. Add --no-local-layer-fusion, or use --optimizer adam.",
            "REMOE-E209",
        )
    is_hybrid = isinstance(model_cfg, HybridModelConfig)
    if args.local_layer_fusion and not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False

    def change(spec: LayerSpec, vp_stage: int | None) -> LayerSpec:
        if args.local_layer_fusion:
            spec = with_fused_layers(spec)
        if not args.sequence_parallel:
            return spec
        if isinstance(spec, ModuleSpec) and not is_hybrid:
            # With the specification of a single layer, Megatron would choose the final norm itself.
            num_layers = get_num_layers_to_build(model_cfg.transformer, vp_stage=vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=WrappedTorchNorm)
        return replace_classes(spec, SEQUENCE_PARALLEL_NORMS)

    _change_layers(model_cfg, change)


def _change_layers(model_cfg: ModelConfig, change: Callable[[LayerSpec, int | None], LayerSpec]) -> None:
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


def build_model(args: argparse.Namespace) -> Any:
    """Build the model that the flags describe, in one part and without Megatron's wrappers.

    Args:
        args: Megatron's arguments, for one pipeline stage without virtual ones.

    Raises:
        TypeError, UsageError: see `install_routing` and `install_local_layers`.
    """
    model_cfg = model_config_from_args(args)
    install_routing(args, model_cfg)
    install_local_layers(args, model_cfg)
    stock = model_cfg.get_builder_cls()(model_cfg).build_model(ProcessGroupCollection.use_mpu_process_groups())
    (model,) = compose_hooks(model_cfg.pre_wrap_hooks)([stock])
    return model
