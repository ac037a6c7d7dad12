"""Install the router that the flags ask for, and its hooks into Megatron's loop."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from megatron.remoe.baselines import ROUTERS
from megatron.remoe.baselines.hash import pass_token_ids
from megatron.remoe.layer.specs import with_router
from megatron.remoe.patches import apply_patches
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.router import ReLURouter
from megatron.remoe.training.layer_changes import ModelConfig, change_layers
from megatron.remoe.training.metrics import ReMoEMetricsTracker
from megatron.remoe.training.pairs import PairCounter


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
    change_layers(model_cfg, lambda spec, _vp_stage: with_router(spec, router))
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
