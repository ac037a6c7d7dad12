"""Convert a checkpoint of the authors' fork (Megatron of December 2024), optimizer state and λ included.

Weights are the same numbers under other names. The fork's distributed optimizer cuts a weight's state into flat parts,
which Megatron no longer reads: they get the weight's shape again.
"""

import argparse
import io
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.remoe.start.checkpoint_files import check_is_whole
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, read_index
from megatron.remoe.training.arguments import apply_granularity, drop_ignored_fork_flags

from ...console.display import Display
from ...console.errors import ConversionError
from ..checkpoints import LAYOUT, find_folder, rename_expert_norm
from ..hf.settings import complete
from ..hybrid import moe_layer_pattern
from .rewriting import OBJECT, Piece, Place, Writer, encoded, objects, read_each, read_tensor, rewritten

COEFFICIENT = "moe_relu_l1_reg_coeff"
LAYER = re.compile(r"(?P<before>decoder\.layers\.)(?P<number>\d+)\.(?P<rest>.+)")
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<kind>fp32_param|exp_avg|exp_avg_sq)\.(?P<weight>.+)")
KEPT = ("checkpoint_version", "iteration", "opt_param_scheduler", "num_floating_point_operations_so_far")


def convert_fork(options: argparse.Namespace, display: Display) -> None:
    """Write the fork's checkpoint under `options.load` as one of this project to `options.save`.

    Raises:
        ConversionError: it is no checkpoint of the fork, cannot be read, or cannot be written.
    """
    folder = find_folder(options.load, options.ckpt_step)
    try:
        state, index = check_is_whole(folder), read_index(folder)
    except BrokenCheckpointError as error:
        raise ConversionError(
            f"--load {options.load}: {error}. Choose another iteration with --ckpt-step. If it has another format than "
            "torch_dist, start the fork once more with its flags and --ckpt-convert-format torch_dist "
            "--ckpt-convert-save FOLDER, and convert with --load FOLDER/torch_dist."
        ) from error
    if not hasattr(state.get("args"), "moe_relu_routing") or hasattr(state["args"], "moe_relu_layer_floor"):
        raise ConversionError(f"--load {folder}: is not a checkpoint of the authors' fork.")
    saved = state["args"]
    if "optimizer" in state and saved.use_distributed_optimizer and not saved.ckpt_fully_parallel_save:
        raise ConversionError(
            f"{folder}: the optimizer's state was saved with --no-ckpt-fully-parallel-save, by ranks. Load and save it "
            "with the fork once more without that flag."
        )
    args = _arguments(saved)
    common = _common(state, args)
    with rewritten(folder, options.save, common) as writer, display.step("copying", len(index.storage_data)):
        target = _Target(args, writer)
        for piece in read_each(folder, _whole_pieces(folder, index)):
            target.add_tensor(*piece)
            display.advance(1)
        for key, content in read_each(folder, map(_renewed, objects(folder, index))):
            target.add_object(key, content)
            display.advance(1)
        if args.moe_relu_routing:
            target.add_router_state("l1_exponent", _exponent(state, args, display))
            target.add_router_state("guarded", 0)
    display.say(f"wrote {options.save}, {folder.name}; continue the training with its flags and --load {options.save}")


def _arguments(saved: argparse.Namespace) -> argparse.Namespace:
    """Return the fork's arguments as this project's training would have saved them."""
    args = complete(saved)
    if not args.num_experts:  # the fork gives dense models a size of experts, which Megatron now refuses
        args.moe_ffn_hidden_size, args.moe_granularity = None, 1
    apply_granularity(args)
    drop_ignored_fork_flags(args)
    if args.moe_relu_routing:
        args.moe_router_load_balancing_type = "none"
    args.dist_ckpt_optim_fully_reshardable = args.use_distributed_optimizer
    return args


class _Target:
    """Names and shapes in this project's checkpoints.

    Where all layers are alike, a weight of all layers is one tensor. A norm before experts is written under its name in
    plain PyTorch layers and under that in Transformer Engine's, so that either can load it.
    """

    def __init__(self, args: argparse.Namespace, writer: Writer) -> None:
        self.writer, self.args = writer, args
        self.experts = [int(bool(args.num_experts) and has) for has in moe_layer_pattern(args)]
        self.stacks = isinstance(args.moe_layer_freq, int) and args.moe_layer_freq == 1

    def add_tensor(self, key: str, shape: Place, offset: Place, tensor: torch.Tensor) -> None:
        """Write a piece of a weight or of its optimizer state."""
        prefix = ""
        if state := STATE.fullmatch(key):
            is_main = state["kind"] == "fp32_param" and self.args.use_distributed_optimizer
            key, prefix = state["weight"], f"optimizer.state.{'param' if is_main else state['kind']}."
        layer = LAYER.fullmatch(key)
        has_experts = self.experts[int(layer["number"])] if layer else all(self.experts)
        if layer and self.stacks:
            key, tensor = layer["before"] + layer["rest"], tensor[None]
            shape, offset = (len(self.experts), *shape), (int(layer["number"]), *offset)
        for name in sorted({key, rename_expert_norm(key)} if has_experts else {key}):
            self.writer.add_tensor(prefix + name, shape, offset, tensor)

    def add_object(self, key: str, content: bytes) -> None:
        """Write Transformer Engine's state of a layer or a state of random numbers."""
        if (layer := LAYER.fullmatch(key)) and self.stacks and (name := OBJECT.fullmatch(layer["rest"])):
            alone = (name["offset"], name["shape"]) == ("0", "1")
            offset, shape = ("", "") if alone else (f".{name['offset']}", f".{name['shape']}")
            place = f"shard_{layer['number']}{offset}_{len(self.experts)}{shape}"
            key = f"{layer['before']}{name['key']}/{place}"
        self.writer.add_object(key, content)

    def add_router_state(self, name: str, value: int) -> None:
        """Write a number for each layer with experts."""
        for layer in itertools.compress(range(len(self.experts)), self.experts):
            self.add_tensor(f"decoder.layers.{layer}.mlp.router.{name}", (), (), torch.tensor(value))


def _renewed(stored: tuple[str, bytes]) -> tuple[str, bytes]:
    """Return a stored object with NumPy's state stored again: NumPy 1 wrote it under a name that no longer exists."""
    key, content = stored
    if not key.startswith("rng_state/"):
        return stored
    rebuild = numpy.empty(0).__reduce__()[0]  # rebuilds arrays; its module's name differs between versions
    former: list[Any] = [(rebuild, "numpy.core.multiarray._reconstruct")]
    with torch.serialization.safe_globals(former):
        return key, encoded(torch.load(io.BytesIO(content), weights_only=True))


def _whole_pieces(folder: Path, index: Metadata) -> Iterator[Piece]:
    """Yield the pieces of all tensors; flat parts of an optimizer's state are put together.

    A weight of shape [S₁, S₂] that is stored in c₁ × c₂ pieces has a state of shape [c₁, c₂, S₁/c₁ · S₂/c₂].
    """
    entries = {key: kind for key, kind in index.state_dict_metadata.items() if isinstance(kind, TensorStorageMetadata)}
    for key, entry in entries.items():
        state = STATE.fullmatch(key)
        if "optimizer." in key and state is None:
            continue  # Adam's step, which is in the settings too
        shape = tuple(entries[state["weight"]].size if state else entry.size)
        if len(entry.size) == len(shape):
            for chunk in entry.chunks:
                yield key, shape, tuple(chunk.offsets), read_tensor(folder, index, key, chunk.offsets)
            continue
        local = [whole // cuts for whole, cuts in zip(shape, entry.size, strict=False)]
        parts = sorted(tuple(chunk.offsets) for chunk in entry.chunks)
        for place, offsets in itertools.groupby(parts, key=lambda part: part[:-1]):
            flat = torch.cat([read_tensor(folder, index, key, torch.Size(part)).flatten() for part in offsets])
            if len(flat) != math.prod(local):
                raise ConversionError(f"{folder}: {key} has {len(flat)} numbers, and its weight {math.prod(local)}.")
            yield key, shape, tuple(cut * size for cut, size in zip(place, local, strict=True)), flat.view(local)


def _common(state: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return settings and counters."""
    layout: dict[str, Any] = dict(LAYOUT)
    if args.use_distributed_optimizer:
        layout["distrib_optim_sharding_type"] = "fully_reshardable"
        layout["distrib_optim_fully_reshardable_mem_efficient"] = False
    common = {name: state[name] for name in KEPT if name in state}
    if "optimizer" in state:
        common["optimizer"] = _optimizer(state["optimizer"], args)
    return common | {"args": args, "content_metadata": layout}


def _optimizer(saved: dict[Any, Any], args: argparse.Namespace) -> dict[Any, Any]:
    """Return the optimizer's settings: experts have groups of their own here, also without expert parallelism."""
    parts = [saved[number] for number in sorted(saved)] if 0 in saved else [saved]
    inner = [part.get("optimizer", part) for part in parts]
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        # What the Adam of either program looks for.
        | {"default_config": True, "bias_correction": True, "decoupled_weight_decay": True, "fused": True}
        for part in inner
        for group in part["param_groups"]
    ]
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
        return {"optimizer": adam} | {name: parts[0][name] for name in ("grad_scaler",) if name in parts[0]}

    if not args.num_experts:
        return optimizer(groups)
    others = [group for group in groups if not group["is_expert_parallel"]]
    of_experts = [group for group in groups if group["is_expert_parallel"]] or [
        group | {"is_expert_parallel": True}
        for group in others
        if (group["wd_mult"] or args.add_bias_linear) and not group["is_decoupled_lr"]
    ]
    return {0: optimizer(others), 1: optimizer(of_experts)}


def _exponent(state: dict[str, Any], args: argparse.Namespace, display: Display) -> int:
    """Return n of λ = λ₀ · αⁿ, rounded, for the λ of the fork."""
    # Of several virtual stages, only the last one's λ is used and changed.
    chunks = sorted(name for name in state if re.fullmatch(r"model\d*", name) and COEFFICIENT in state[name])
    if not chunks:
        raise ConversionError(f"--load: the checkpoint holds no {COEFFICIENT}.")
    coefficient = float(state[chunks[-1]][COEFFICIENT])
    first, factor = args.moe_relu_l1_reg_coeff_init, args.moe_relu_l1_reg_coeff_multiplier
    if not (0 < coefficient < math.inf and first > 0 and factor > 1):
        raise ConversionError(f"--load: λ is {coefficient}, λ₀ {first} and α {factor}; there is no such power of α.")
    exact = math.log(coefficient / first) / math.log(factor)
    rounded = first * factor ** round(exact)
    display.say(
        f"λ {coefficient:.6e} of the fork is {first:g} · {factor:g}^{exact:.4f}; "
        f"here it is {rounded:.6e}, with the exponent {round(exact)}"
    )
    return round(exact)
