"""Convert a checkpoint of the authors' fork (Megatron of December 2024), optimizer state and λ included.

Weights are the same numbers under different names. The fork's distributed optimizer cuts a weight's state into flat
parts, which Megatron no longer reads. This tool gives them the weight's shape again.
"""

import argparse
import math
import re
from pathlib import Path
from shlex import quote
from typing import Any

import numpy
import torch

from megatron.remoe.training.arguments import apply_granularity, drop_ignored_fork_flags

from ...console.errors import ConversionError
from ...recipes.flops import moe_layer_pattern
from ..checkpoints import LAYOUT, open_folder, rename_expert_norm
from ..hf.settings import complete
from .rewriting import LAYER, Content, read_content, stack_layers, write_content

COEFFICIENT = "moe_relu_l1_reg_coeff"
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<kind>fp32_param|exp_avg|exp_avg_sq)\.(?P<weight>.+)")
KEPT = ("checkpoint_version", "iteration", "opt_param_scheduler", "num_floating_point_operations_so_far")


def convert_fork(options: argparse.Namespace) -> None:
    """Write the fork's checkpoint under `options.load` to `options.save` as one of this project.

    Raises:
        ConversionError: it is not a checkpoint of the fork, or cannot be read, converted or written.
    """
    folder, state, index = open_folder(options.load, options.ckpt_step)
    saved: Any = state.get("args")
    if not hasattr(saved, "moe_relu_routing") or hasattr(saved, "moe_relu_layer_floor"):
        raise ConversionError(f"--load {folder}: is not a checkpoint of the authors' fork.")
    if "optimizer" in state and saved.use_distributed_optimizer and not saved.ckpt_fully_parallel_save:
        raise ConversionError(
            f"{folder}: the optimizer's state was saved with --no-ckpt-fully-parallel-save, by ranks. Load and save it "
            "with the fork once more without that flag."
        )
    args = _complete_arguments(saved)
    content = _rename_weights(_join_state(read_content(folder, index), folder), args)
    if args.moe_relu_routing:
        values = {"l1_exponent": _exponent(state, args), "guarded": 0}
        for layer, has_experts in enumerate(moe_layer_pattern(args)):
            for name, value in values.items() if has_experts else ():
                content[f"decoder.layers.{layer}.mlp.router.{name}"] = torch.tensor(value)
    if args.moe_layer_freq == 1:
        content = stack_layers(content, args.num_layers)
    write_content(content, _collect_settings(state, args), options.save, folder.name)
    print(f"wrote {options.save}, {folder.name}; continue the run with its flags and --load {quote(str(options.save))}")


def _complete_arguments(saved: argparse.Namespace) -> argparse.Namespace:
    """Return the fork's arguments as this project would have saved them."""
    args = complete(saved)
    if not args.num_experts:  # the fork gives dense models a size of experts, which Megatron now refuses
        args.moe_ffn_hidden_size, args.moe_granularity = None, 1
    apply_granularity(args)
    drop_ignored_fork_flags(args)
    if args.moe_relu_routing:
        args.moe_router_load_balancing_type = "none"
    args.dist_ckpt_optim_fully_reshardable = args.use_distributed_optimizer
    return args


def _join_state(content: Content, folder: Path) -> Content:
    """Return the content with each optimizer state in the shape of its weight, and without Adam's step.

    The state of a weight [S₁, S₂] that is stored in c₁ × c₂ pieces has the shape [c₁, c₂, S₁/c₁ · S₂/c₂].
    """
    result: Content = {}
    for key, value in content.items():
        state = STATE.fullmatch(key)
        if "optimizer." in key and state is None:
            continue  # Adam's step, which is in the settings too
        if state and value.dim() > len(shape := content[state["weight"]].shape):
            pieces = [size // cuts for size, cuts in zip(shape, value.shape, strict=False)]
            if value.shape[-1] != math.prod(pieces):
                raise ConversionError(f"{folder}: {key} has the shape {list(value.shape)}, and its weight {[*shape]}.")
            order = torch.arange(2 * len(shape)).view(2, -1).T.flatten().tolist()
            value = value.view(*value.shape[:-1], *pieces).permute(order).reshape(shape)
        result[key] = value
    return result


def _rename_weights(content: Content, args: argparse.Namespace) -> Content:
    """Return the content under the names of this project's checkpoints.

    A norm before experts gets both of its names, so that plain PyTorch layers and Transformer Engine's can load it.
    """
    result: Content = {}
    experts = moe_layer_pattern(args)
    for key, value in content.items():
        prefix = ""
        if state := STATE.fullmatch(key):
            is_main = state["kind"] == "fp32_param" and args.use_distributed_optimizer
            key, prefix = state["weight"], f"optimizer.state.{'param' if is_main else state['kind']}."
        if args.moe_relu_routing:
            key = key.replace(".router.weight", ".router.relu_weight")
        layer = LAYER.fullmatch(key)
        has_experts = experts[int(layer["number"])] if layer and layer["number"] else all(experts)
        names = {key, rename_expert_norm(key)} if has_experts and torch.is_tensor(value) else {key}
        result |= dict.fromkeys((prefix + name for name in names), _refresh_object(key, value))
    return result


def _refresh_object(key: str, value: Any) -> Any:
    """Load a random state, to store it again: NumPy 1's name for it no longer exists. Return others unchanged."""
    if not key.startswith("rng_state/"):
        return value
    rebuild = numpy.empty(0).__reduce__()[0]  # rebuilds arrays; its module's name differs between versions
    former: list[Any] = [(rebuild, "numpy.core.multiarray._reconstruct")]
    with torch.serialization.safe_globals(former):
        return torch.load(value, weights_only=True)


def _collect_settings(state: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings and counters of the new checkpoint."""
    layout: dict[str, Any] = dict(LAYOUT)
    if args.use_distributed_optimizer:
        layout["distrib_optim_sharding_type"] = "fully_reshardable"
        layout["distrib_optim_fully_reshardable_mem_efficient"] = False
    common = {name: state[name] for name in KEPT if name in state}
    if "optimizer" in state:
        common["optimizer"] = _convert_optimizer(state["optimizer"], args)
    return common | {"args": args, "content_metadata": layout}


def _convert_optimizer(saved: dict[Any, Any], args: argparse.Namespace) -> dict[Any, Any]:
    """Return the optimizer's settings. Experts have separate groups here, even without expert parallelism."""
    parts = [saved[number] for number in sorted(saved)] if 0 in saved else [saved]
    inner = [part.get("optimizer", part) for part in parts]
    # PyTorch's and the fork's Adam read these names.
    added = {"default_config": True, "bias_correction": True, "decoupled_weight_decay": True, "fused": True}
    groups = [group | added for part in inner for group in part["param_groups"]]
    for group in groups:
        group.pop("params", None)
    states = [value for part in inner for value in (part.get("state") or {}).values()]
    steps = [value["step"] if isinstance(value, dict) and "step" in value else value for value in states]
    step = float(groups[0].get("step", next(filter(torch.is_tensor, steps), 0)))

    def optimizer(groups: list[dict[str, Any]]) -> dict[str, Any]:
        if args.use_distributed_optimizer:
            return {
                "optimizer": {"param_groups": [group | {"step": step} for group in groups]},
                "param_state_sharding_type": "fully_reshardable",
            }
        adam = {"state": {"common_step": torch.tensor(step)}, "param_groups": groups}
        if not (args.bf16 or args.fp16):
            return adam
        scaler = {"grad_scaler": parts[0]["grad_scaler"]} if "grad_scaler" in parts[0] else {}
        return {"optimizer": adam} | scaler

    if not args.num_experts:
        return optimizer(groups)
    other_groups = [group for group in groups if not group["is_expert_parallel"]]
    expert_groups = [group for group in groups if group["is_expert_parallel"]] or [
        group | {"is_expert_parallel": True}
        for group in other_groups
        if (group["wd_mult"] or args.add_bias_linear) and not group["is_decoupled_lr"]
    ]
    return {0: optimizer(other_groups), 1: optimizer(expert_groups)}


def _exponent(state: dict[str, Any], args: argparse.Namespace) -> int:
    """Return n of λ = λ₀ · αⁿ, rounded, for the λ of the fork."""
    # With several virtual pipeline stages, the fork uses and changes only the last one's λ.
    chunks = sorted(name for name in state if re.fullmatch(r"model\d*", name) and COEFFICIENT in state[name])
    if not chunks:
        raise ConversionError(f"--load: the checkpoint holds no {COEFFICIENT}.")
    coefficient = float(state[chunks[-1]][COEFFICIENT])
    first, factor = args.moe_relu_l1_reg_coeff_init, args.moe_relu_l1_reg_coeff_multiplier
    if not (0 < coefficient < math.inf and first > 0 and factor > 1):
        raise ConversionError(f"--load: λ is {coefficient}, λ₀ {first} and α {factor}; there is no such power of α.")
    exact = math.log(coefficient / first) / math.log(factor)
    rounded = first * factor ** round(exact)
    print(
        f"λ {coefficient:.6e} of the fork is {first:g} · {factor:g}^{exact:.4f}; "
        f"here it is {rounded:.6e}, with the exponent {round(exact)}"
    )
    return round(exact)
