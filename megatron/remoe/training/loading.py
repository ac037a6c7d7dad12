"""Whether the checkpoint under --load fits the flags: from the arguments saved in it, before anything starts."""

import argparse
import io
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.compatibility import flag, shown
from megatron.remoe.training.checkpoints import TRACKER, BrokenCheckpointError, read_index
from megatron.training.models.gpt import GPTModelConfig

# What gives the weights their shapes, with `_sizes` below.
SHAPE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_experts",
    "moe_shared_expert_intermediate_size",
    "swiglu",
    "add_bias_linear",
    "normalization",
    "untie_embeddings_and_output_weights",
)
L1 = ("moe_relu_l1_reg_coeff_init", "moe_relu_l1_reg_coeff_multiplier")
# Megatron finds the optimizer's state in the checkpoint by these, whatever it is told about the schedule.
RATES = ("lr", "min_lr")
# It compares these with the checkpoint's when everything is built and loaded.
SCHEDULE = ("lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction", "weight_decay")
DURATION = ("train_iters", "lr_decay_iters", "train_samples", "lr_decay_samples", "global_batch_size")
# A setting that follows from another one where it is not given: tells nothing where that differs.
FOLLOWS = {"kv_channels": "hidden_size", "moe_layer_freq": "num_layers", "lr_decay_iters": "train_iters"}
NEW_TRAINING = "--finetune with another --save to start a new training from its weights"
SPLIT_BY_GRANULARITY = {"num_experts": 1, "moe_router_topk": 1, "moe_ffn_hidden_size": -1}
CONVERT = "tools/convert_checkpoint makes a ReMoE of it"
Settings = dict[str, Any]


def checkpoint_folder(args: argparse.Namespace) -> Path | None:
    """The folder of the iteration that Megatron will load; None where there is none, or not a torch_dist one."""
    if not args.load:
        return None
    root = Path(args.load)
    tracker = root / TRACKER
    newest = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    if args.ckpt_step:
        folder = root / f"iter_{args.ckpt_step:07d}"
    elif newest == "release":
        folder = root / newest
    elif newest.isdecimal():
        folder = root / f"iter_{int(newest):07d}"
    else:
        return None
    return folder if (folder / ".metadata").is_file() else None


def saved_arguments(folder: Path) -> argparse.Namespace | None:
    """Megatron's arguments of the training that wrote a torch_dist checkpoint; nothing in it is executed.

    Args:
        folder: of one iteration.

    Raises:
        BrokenCheckpointError: they cannot be read, or hold what is no setting.
    """
    try:
        if (folder / "common.pt").is_file():
            state = torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
        else:
            entries = read_index(folder).storage_data
            entry = next((entries[key] for key in entries if key.fqn.startswith("common_state/")), None)
            if entry is None:
                return None
            with (folder / entry.relative_path).open("rb") as file:
                file.seek(entry.offset)
                state = torch.load(io.BytesIO(file.read(entry.length)), map_location="cpu", weights_only=True)
        state = state[0] if isinstance(state, list) else state
        if isinstance(state, io.BytesIO):
            state.seek(0)
            state = torch.load(state, map_location="cpu", weights_only=True)
    except BrokenCheckpointError:
        raise
    except Exception as error:  # whatever reading a damaged file raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BrokenCheckpointError(
            f"--load: the settings saved in {folder} cannot be read ({reason[:200]}). If it is damaged, give an "
            "earlier iteration with --ckpt-step."
        ) from error
    return state.get("args") if isinstance(state, dict) else None


def check_loaded_run(args: argparse.Namespace) -> None:
    """Refuse a checkpoint that Megatron would refuse late, or that would silently become another training.

    Args:
        args: Megatron's arguments, validated.

    Raises:
        ValueError: names flag, both values and the remedy.
    """
    _check_is_there(args)
    folder = checkpoint_folder(args)
    saved = saved_arguments(folder) if folder is not None else None
    if folder is None or saved is None:
        return
    if args.dist_ckpt_strictness in ("assume_ok_unexpected", "raise_unexpected", "raise_all"):
        _check_routing(args, saved, folder)
    if different := _differences(_shape(args), _shape(saved), args, saved):
        raise ValueError(
            f"--load {folder} holds a model of another shape: {different}. Give its values, or another --load."
        )
    if args.finetune or folder.name == "release":
        return
    routing = ("moe_router_topk", *(L1 if args.moe_relu_routing else ())) if args.num_experts else ()
    kept = routing if args.no_load_optim else routing + RATES
    if different := _differences(_picked(args, kept), _picked(saved, kept), args, saved):
        raise ValueError(
            f"--load {folder}: resuming with other settings than it was saved with: {different}. Give its values, or "
            f"{NEW_TRAINING}."
        )
    if args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    schedule = SCHEDULE if _duration(args) == _duration(saved) else DURATION + SCHEDULE
    if different := _differences(_picked(args, schedule), _picked(saved, schedule), args, saved):
        raise ValueError(
            f"--load {folder}: the learning rate would follow another schedule than before: {different}. Give its "
            "values, or --override-opt_param-scheduler to follow the flags, or --use-checkpoint-opt_param-scheduler to "
            "follow the checkpoint."
        )


def with_checked_weights(
    args: argparse.Namespace, model_cfg: GPTModelConfig, provider: Callable[..., Any]
) -> Callable[..., Any]:
    """The provider of the data sets, which Megatron calls after loading: it first looks whether all weights are finite.

    Args:
        args: Megatron's arguments.
        model_cfg: the configuration that the model will be built from.
        provider: of the data sets.
    """
    chunks: list[torch.nn.Module] = []

    def keep(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        chunks.extend(model_chunks)
        return model_chunks

    @wraps(provider)
    def checked(*arguments: Any, **options: Any) -> Any:
        while chunks:
            _check_is_finite(args.load, chunks.pop())
        return provider(*arguments, **options)

    if not args.load:
        return provider
    model_cfg.post_wrap_hooks.append(keep)
    return checked


@torch.no_grad()
def _check_is_finite(load: str, chunk: torch.nn.Module) -> None:
    finite = {name: torch.isfinite(weight).all() for name, weight in chunk.named_parameters()}
    if not finite or torch.stack(list(finite.values())).all():
        return
    name = next(name for name, value in finite.items() if not value).removeprefix("module.").removeprefix("module.")
    raise ValueError(
        f"--load {load}: {name} holds values that are not finite. Go back to an earlier iteration with --ckpt-step."
    )


def _check_is_there(args: argparse.Namespace) -> None:
    """Where no checkpoint is found Megatron starts from random weights: right for a first start alone."""
    if not args.load or "://" in args.load or (Path(args.load) / TRACKER).is_file() or args.ckpt_step:
        return
    if args.pretrained_checkpoint or args.non_persistent_save_interval or args.non_persistent_global_ckpt_dir:
        return
    resumes = args.save and Path(args.save).resolve() == Path(args.load).resolve()
    if args.finetune or args.exit_on_missing_checkpoint or not resumes:
        raise ValueError(
            f"--load {args.load}: holds no checkpoint (there is no {TRACKER}). Give what a training had under --save, "
            "or leave --load out to start from random weights."
        )


def _check_routing(args: argparse.Namespace, saved: argparse.Namespace, folder: Path) -> None:
    was_relu = getattr(saved, "moe_relu_routing", False)
    if args.moe_relu_routing and not was_relu:
        kind = "top-k MoE" if getattr(saved, "num_experts", None) else "dense"
        raise ValueError(
            f"--load {folder} holds a {kind} model, from which --moe-relu-routing cannot start: {CONVERT}."
        )
    if was_relu and not args.moe_relu_routing and not args.finetune:
        raise ValueError(
            f"--load {folder} holds a ReMoE: add --moe-relu-routing, or --finetune to start another model from it."
        )


def _picked(args: argparse.Namespace, names: tuple[str, ...]) -> Settings:
    """The settings of these names that there are; Megatron's older checkpoints do not have all."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _shape(args: argparse.Namespace) -> Settings:
    shape = _picked(args, SHAPE)
    if getattr(args, "hybrid_layer_pattern", None) or getattr(args, "heterogeneous_layers_config_encoded_json", None):
        return {}
    if getattr(args, "group_query_attention", False):
        shape["num_query_groups"] = args.num_query_groups
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(args.num_layers)]
    if not getattr(args, "num_experts", None):
        return shape | {"ffn_hidden_size": args.ffn_hidden_size}
    shape |= {"moe_layer_freq": frequency, "moe_ffn_hidden_size": args.moe_ffn_hidden_size or args.ffn_hidden_size}
    return shape if all(frequency) else shape | {"ffn_hidden_size": args.ffn_hidden_size}


def _duration(args: argparse.Namespace) -> tuple[Any, Any]:
    """Samples until the end of the training and until the end of the learning rate's decay."""
    if getattr(args, "train_iters", None) and not getattr(args, "train_samples", None):
        decay = getattr(args, "lr_decay_iters", None) or args.train_iters
        return args.train_iters * args.global_batch_size, decay * args.global_batch_size
    samples = getattr(args, "train_samples", None)
    return samples, getattr(args, "lr_decay_samples", None) or samples


def _differences(mine: Settings, other: Settings, args: argparse.Namespace, saved: argparse.Namespace) -> str:
    """The settings that differ of those that both have, as flags with both values."""
    names = [name for name in mine if name in other and not _same(mine[name], other[name])]
    if not names:
        return ""
    here, there = args.moe_granularity, getattr(saved, "moe_granularity", 1)
    parts = [] if here == there else [_difference("moe_granularity", there, here)]
    for name in names:
        if FOLLOWS.get(name) in names:
            continue
        power = SPLIT_BY_GRANULARITY.get(name, 0)
        values = _as_given(other[name], there, power), _as_given(mine[name], here, power)
        if values[0] != values[1]:
            parts.append(_difference(name, *values))
    return "; ".join(parts)


def _difference(name: str, there: Any, here: Any) -> str:
    return f"{flag(name)} {shown(there)} in the checkpoint, {shown(here)} here"


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, float) and isinstance(other, float | int):
        return math.isclose(mine, other, rel_tol=1e-12)
    return bool(mine == other)


def _as_given(value: Any, granularity: int, power: int) -> Any:
    if not isinstance(value, int) or not power:
        return value
    return value // granularity if power > 0 else value * granularity
