"""Make the arguments and weights of a ReMoE from those of its source."""

import argparse
import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.remoe.routing.refusals import flag_name, routing_problems

from ...console.errors import ConversionError
from ...recipes.megatron_values import make_parser
from ..megatron_model import EXPERT, SINGLE_PROCESS_SETTINGS
from .fitting import Fit

# Settings that only top-k routing uses; a ReMoE has their defaults.
TOPK_ONLY = """moe_aux_loss_coeff moe_router_score_function moe_router_enable_expert_bias moe_router_topk_scaling_factor
moe_router_num_groups moe_router_group_topk moe_router_topk_limited_devices moe_router_fusion moe_expert_capacity_factor
moe_pad_expert_input_to_capacity moe_enable_deepep moe_warmup_topk moe_warmup_steps""".split()
BAD_FLAG = "REMOE-E501"  # code of errors about flags that do not fit
ROUTER = re.compile(r".*\.layers\.(?P<layer>\d+)\.mlp\.router\.(?P<name>[\w.]+)")


def target_args(source: argparse.Namespace, options: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of the ReMoE, made from its source's arguments and the tool's flags (None if not given).

    Raises:
        ConversionError: the flags do not fit the source, the source is a ReMoE already, or ReLU routing does not work
            with its other settings.
    """
    if source.moe_relu_routing:
        raise ConversionError("--load: this is a checkpoint of a ReMoE already. Continue training with --load.")
    if source.mtp_num_layers:
        raise ConversionError(
            f"--load: layers of multi-token prediction are not converted, and it has {source.mtp_num_layers} of them."
        )
    if router := source.moe_baseline_router:
        raise ConversionError(f"--load: has --moe-baseline-router {router}. Only dense and top-k models are converted.")
    target = copy.copy(source)
    if source.num_experts is None:
        _become_mixture(target, options)
    else:
        _refuse_shape(options)
    target.moe_relu_routing, target.moe_relu_normalize = True, bool(options.moe_relu_normalize)
    target.moe_router_load_balancing_type, target.moe_token_dispatcher_type = "none", "alltoall"
    defaults = vars(make_parser().parse_args([]))
    vars(target).update({name: defaults.get(name) for name in TOPK_ONLY})  # None for another version's flags
    vars(target).update(consumed_train_samples=0, skipped_train_samples=0, consumed_valid_samples=0, iteration=0)
    in_one_process = argparse.Namespace(**(vars(target) | SINGLE_PROCESS_SETTINGS))  # layout and speed can change
    problems = routing_problems(in_one_process)
    if problems:
        raise ConversionError("\n".join(problems), "")  # each has its code
    return target


def _become_mixture(target: argparse.Namespace, options: argparse.Namespace) -> None:
    if options.num_experts is None:
        raise ConversionError("--load is a dense checkpoint: give --num-experts.", BAD_FLAG)
    target.num_experts, target.moe_ffn_hidden_size = options.num_experts, None
    target.moe_router_topk = 1 if options.moe_router_topk is None else options.moe_router_topk
    target.moe_granularity = target.moe_layer_freq = 1
    target.moe_ffn_hidden_size = target.ffn_hidden_size


def _refuse_shape(options: argparse.Namespace) -> None:
    for name in ("num_experts", "moe_router_topk"):
        if getattr(options, name) is not None:
            raise ConversionError(f"{flag_name(name)}: --load is a top-k checkpoint, whose experts are kept.", BAD_FLAG)


@torch.no_grad()
def fill(target: GPTModel, source: GPTModel, routers: dict[int, Fit]) -> None:
    """Copy the source's weights into the ReMoE; a dense layer goes into each expert.

    Args:
        target: the ReMoE, changed.
        source: dense or top-k.
        routers: layer's index → its fitted router.
    """
    state = source.state_dict()
    for name, tensor in target.state_dict().items():
        expert, router = EXPERT.fullmatch(name), ROUTER.fullmatch(name)
        if router and router["name"] == "weight":
            tensor.copy_(routers[int(router["layer"])].weights)
        elif not torch.is_tensor(tensor) or router:
            continue  # λ starts at λ₀
        elif expert and name not in state:
            tensor.copy_(state[expert["mlp"] + expert["weight"]])
        else:
            tensor.copy_(state[name])
    for layer, fit in routers.items():
        gate_scale = target.decoder.layers[layer].mlp.router.gate_scale
        if gate_scale is not None:
            gate_scale.scale.fill_(fit.scale / gate_scale.initial)


@contextmanager
def record_routers(source: GPTModel, layers: list[int]) -> Iterator[tuple[dict[int, Any], dict[int, Any]]]:
    """Collect the inputs of feed-forward layers and the gates of top-k routers inside the `with` block.

    Yields:
        Two maps, layer's index → list: inputs `[tokens, hidden]`; gates `[tokens, num_experts]`, empty if it is dense.
    """
    inputs: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    gates: dict[int, list[torch.Tensor]] = {index: [] for index in layers}

    def keep_input(index: int, _module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = positional[0] if positional else named["hidden_states"]
        inputs[index].append(hidden.reshape(-1, hidden.shape[-1]).clone())

    def keep_gates(index: int, _module: Any, _arguments: Any, routed: tuple[torch.Tensor, ...]) -> None:
        gates[index].append((routed[0] * routed[1]).float())

    with ExitStack() as hooks:
        for index in layers:
            mlp = source.decoder.layers[index].mlp
            hooks.enter_context(mlp.register_forward_pre_hook(partial(keep_input, index), with_kwargs=True))
            if isinstance(mlp, MoELayer):
                hooks.enter_context(mlp.router.register_forward_hook(partial(keep_gates, index)))
        yield inputs, gates
