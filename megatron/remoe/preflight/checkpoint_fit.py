"""Compares the checkpoint under --load with the flags, by the arguments saved in it, before anything starts."""

import argparse
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.data.errors import UsageError
from megatron.remoe.preflight.checkpoint_files import RELEASE, TRACKER, Resume, choose_checkpoint, newest_iteration
from megatron.remoe.preflight.checkpoint_index import INDEX, BrokenCheckpointError, common_state
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.refusals import flag as flag_of
from megatron.remoe.routing.refusals import shown

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
    "mtp_num_layers",
    "mtp_use_repeated_layer",
)
DATA = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
# What a training's result depends on, beside its shape and the learning rate's schedule.
RESULT = """
seed split mock_data dataloader_type seq_length global_batch_size rampup_batch_size reset_position_ids
reset_attention_mask eod_mask_loss calculate_per_token_loss optimizer adam_beta1 adam_beta2 adam_eps sgd_momentum
clip_grad bf16 fp16 decoupled_lr decoupled_min_lr attention_dropout hidden_dropout init_method_std
init_method_xavier_uniform layernorm_epsilon position_embedding_type rotary_base rotary_percent window_size
mtp_loss_scaling_factor mtp_detach_heads
""".split()
RESULT_OF_EXPERTS = """
moe_router_topk moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_router_dtype
moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups
moe_router_group_topk moe_router_enable_expert_bias moe_router_bias_update_rate moe_input_jitter_eps
moe_expert_capacity_factor moe_token_drop_policy moe_pad_expert_input_to_capacity moe_apply_probs_on_input
moe_warmup_topk moe_warmup_steps moe_baseline_router
""".split()
# ReLU routing's own settings do, but for the exact one and the one that the shape tells.
RESULT_OF_RELU = [
    field.name
    for field in fields(ReMoEConfig)
    if field.name.startswith("moe_relu_") and field.name not in ("moe_relu_activation_limit", "moe_relu_router_bias")
]
# Megatron finds the optimizer's state in the checkpoint by these, whatever it is told about the schedule.
RATES = ("lr", "min_lr")
# It compares these with the checkpoint's when everything is built and loaded.
SCHEDULE = ("lr_decay_style", "lr_warmup_iters", "lr_warmup_fraction", "weight_decay")
DURATION = ("train_iters", "lr_decay_iters", "train_samples", "lr_decay_samples", "global_batch_size")
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# A setting that follows from another one where it is not given: tells nothing where that differs.
FOLLOWS = {"kv_channels": "hidden_size", "moe_layer_freq": "num_layers", "lr_decay_iters": "train_iters"}
FOLLOWS |= {"expert_tensor_parallel_size": "tensor_model_parallel_size"}
SPLIT_BY_GRANULARITY = {"num_experts": 1, "moe_router_topk": 1, "moe_warmup_topk": 1, "moe_ffn_hidden_size": -1}
SHOWN = 120  # letters of a setting, as of a list of data sets
Settings = dict[str, Any]


def moe_layer_pattern(args: argparse.Namespace) -> list[int]:
    """--moe-layer-freq of a GPTModel as Megatron reads it: for each layer, from the first, 1 if it has experts, else 0.

    Args:
        args: Megatron's, or those in a checkpoint, of which older ones have no such flag.
    """
    frequency: int | list[int] = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return frequency


def iteration_folder(root: Path, args: argparse.Namespace) -> Path | None:
    """The folder of the iteration that Megatron loads from a folder of checkpoints; None if it is no torch_dist one."""
    newest = newest_iteration(root)
    if newest == RELEASE:
        folder = root / RELEASE
    elif args.ckpt_step or newest.isdecimal():
        folder = root / f"iter_{args.ckpt_step or int(newest):07d}"
    else:
        return None
    return folder if (folder / INDEX).is_file() else None


def check_is_data_alone(args: argparse.Namespace) -> None:
    """Refuse checkpoints whose index or settings would run code. Call it before Megatron reads the settings.

    Raises:
        BrokenCheckpointError: names flag and file.
    """
    for flag, root in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        folder = iteration_folder(Path(root), args) if root else None
        if folder is None:
            continue
        try:
            common_state(folder)
        except BrokenCheckpointError as error:
            raise BrokenCheckpointError(f"{flag}: {error}. Give an earlier iteration with --ckpt-step.") from error


def check_loaded_run(args: argparse.Namespace, resume: Resume | None = None) -> bool:
    """Refuse a checkpoint that Megatron would refuse late, or that would silently become another training.

    Args:
        args: Megatron's arguments, validated.
        resume: the checkpoint to go on from, if it was chosen already.

    Returns:
        Whether the training goes on with the same learning rates to another end. The caller then has to set
        `args.override_opt_param_scheduler`: Megatron refuses another end, since weight decay can grow until then.

    Raises:
        UsageError: names flag, both values and the remedy.
    """
    resume = resume or choose_checkpoint(args)
    if resume is None:
        _check_is_there(args)
        return False
    if resume.saved is None:
        return False
    problems = _of_the_model(args, resume.saved, resume.flag)
    goes_on = not args.finetune and resume.folder.name != RELEASE and resume.flag == "--load"
    if goes_on:
        problems = itertools.chain(problems, _of_the_training(args, resume.saved))
    for code, problem in problems:
        raise UsageError(f"{resume.flag} {resume.folder}{problem}", code)
    if not goes_on or not _compares_schedules(args):
        return False
    return bool(_duration(args)[0] != _duration(resume.saved)[0] and args.weight_decay_incr_style == "constant")


@torch.no_grad()
def check_is_finite(source: str, chunk: torch.nn.Module) -> None:
    """Check that all weights of a model chunk are finite.

    Args:
        source: where they were loaded from, as flag and folder.
        chunk: the model, or a part of it.

    Raises:
        UsageError: names the first weight that is not, and the remedy.
    """
    finite = {name: torch.isfinite(weight).all() for name, weight in chunk.named_parameters()}
    if not finite or torch.stack(list(finite.values())).all():
        return
    name = next(name for name, value in finite.items() if not value).removeprefix("module.").removeprefix("module.")
    raise UsageError(
        f"{source}: {name} holds values that are not finite. Go back to an earlier iteration with --ckpt-step.",
        "REMOE-E406",
    )


def _check_is_there(args: argparse.Namespace) -> None:
    """Refuse to start from random weights, which Megatron does without a checkpoint, but for a first start."""
    places = [("--pretrained-checkpoint", args.pretrained_checkpoint), ("--load", args.load)]
    flag, folder = next(((flag, folder) for flag, folder in places if folder), ("", ""))
    if args.non_persistent_save_interval or args.non_persistent_global_ckpt_dir:
        return
    if not folder or any("://" in (folder or "") for _, folder in places):
        return
    first_start = args.save and Path(args.save).resolve() == Path(folder).resolve()
    if first_start and flag == "--load" and not args.finetune and not args.exit_on_missing_checkpoint:
        return
    raise BrokenCheckpointError(
        f"{flag} {folder}: holds no checkpoint (there is no {TRACKER}). Give what a training had under --save, or "
        f"leave {flag} out to start from random weights.",
        "REMOE-E404",
    )


def _of_the_model(args: argparse.Namespace, saved: argparse.Namespace, flag: str) -> Iterator[tuple[str, str]]:
    """Yield the code and the message of what keeps the checkpoint's weights from being this model's."""
    was_relu, experts = getattr(saved, "moe_relu_routing", False), getattr(saved, "num_experts", None)
    here, there = args.hybrid_layer_pattern, getattr(saved, "hybrid_layer_pattern", None)
    if args.dist_ckpt_strictness in ("assume_ok_unexpected", "raise_unexpected", "raise_all"):
        if args.moe_relu_routing and not was_relu:
            kind = "top-k MoE" if experts else "dense"
            remedy = "tools/convert_checkpoint makes a ReMoE of it"
            yield "REMOE-E412", f" holds a {kind} model, from which --moe-relu-routing cannot start: {remedy}."
        if was_relu and not args.moe_relu_routing and not args.finetune:
            yield "REMOE-E412", " holds a ReMoE: add --moe-relu-routing, or --finetune to start another model from it."
    # Megatron reads GPTModel's checkpoints into a HybridModel where all layers are alike, and none the other way.
    if there and not here:
        yield (
            "REMOE-E412",
            f" holds a HybridModel: add --hybrid-layer-pattern '{there}', or make a GPTModel's checkpoint of it with "
            "tools/convert_checkpoint --model gpt.",
        )
    if here and not there and {"E", "-"} <= set(here):
        yield (
            "REMOE-E412",
            f" holds a GPTModel, which Megatron reads into a HybridModel only where its layers are all alike, and "
            f"--hybrid-layer-pattern {here} has - and E: use tools/convert_checkpoint --model hybrid.",
        )
    if different := _differences(_shape(args), _shape(saved), args, saved):
        yield "REMOE-E411", f" holds a model of another shape: {different}. Give its values, or another {flag}."


def _of_the_training(args: argparse.Namespace, saved: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield the code and the message of what would make another training of the saved one."""
    rates = "" if args.no_load_optim else _differences(_picked(args, RATES), _picked(saved, RATES), args, saved)
    settings = "" if args.allow_changed_settings else _differences(_result(args), _result(saved), args, saved)
    if different := "; ".join(filter(None, (rates, settings))):
        meant = "" if rates else "--allow-changed-settings where this is meant, or "
        yield (
            "REMOE-E413",
            f": resuming with other settings than it was saved with: {different}. Give its values, or another --save "
            f"and --load, or {meant}--finetune with another --save to start a new training from its weights.",
        )
    if not args.no_load_optim and (problem := _of_the_optimizer(args, saved)):
        yield "REMOE-E414", f": {problem}, or give --no-load-optim to go on with new optimizer state."
    schedule = SCHEDULE if _duration(args)[1] == _duration(saved)[1] else DURATION + SCHEDULE
    different = _differences(_picked(args, schedule), _picked(saved, schedule), args, saved)
    if different and _compares_schedules(args):
        yield (
            "REMOE-E415",
            f": the learning rate would follow another schedule than before: {different}. Give its values, or "
            "--override-opt_param-scheduler to follow the flags, or --use-checkpoint-opt_param-scheduler to follow "
            "the checkpoint.",
        )


def _of_the_optimizer(args: argparse.Namespace, saved: argparse.Namespace) -> str:
    """Return why the optimizer's state does not fit, or "".

    The distributed optimizer's state is that of ranks; Megatron loads it on other ranks in some cases only.
    """
    was_distributed = getattr(saved, "use_distributed_optimizer", False)
    if was_distributed != args.use_distributed_optimizer:
        kind, remedy = ("that", "Add it") if was_distributed else ("not that", "Leave it out")
        return f"its optimizer state is {kind} of --use-distributed-optimizer. {remedy}"
    if not was_distributed or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return ""
    only_for = "without --dist-ckpt-optim-fully-reshardable the distributed optimizer's state was saved for"
    if args.hybrid_layer_pattern and not getattr(saved, "hybrid_layer_pattern", None):
        return f"{only_for} GPTModel alone. Save once more with the flag"
    was_fused = getattr(saved, "local_layer_fusion", False) and getattr(saved, "transformer_impl", "") == "local"
    if args.num_experts and was_fused != (args.local_layer_fusion and args.transformer_impl == "local"):
        kind, remedy = ("grouped experts", "Leave out") if was_fused else ("experts one by one", "Add")
        return f"{only_for} {kind}. {remedy} --no-local-layer-fusion"
    if different := _differences(_picked(args, LAYOUT), _picked(saved, LAYOUT), args, saved):
        return f"{only_for} its layout alone: {different}. Save once more in that layout with the flag"
    return ""


def _compares_schedules(args: argparse.Namespace) -> bool:
    return not (args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler)


def _picked(args: argparse.Namespace, names: Iterable[str]) -> Settings:
    """The settings of these names that there are; Megatron's older checkpoints do not have all."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _result(args: argparse.Namespace) -> Settings:
    """What the result depends on; data sets by their names, for they may have been moved."""
    names = RESULT + (RESULT_OF_EXPERTS if getattr(args, "num_experts", None) else [])
    result = _picked(args, names + (RESULT_OF_RELU if getattr(args, "moe_relu_routing", False) else []))
    for name, words in _picked(args, DATA).items():
        words = [words] if isinstance(words, str) else words or []
        result[name] = [_weight_or_name(word) for word in words]
    return result


def _weight_or_name(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return Path(word).name


def _shape(args: argparse.Namespace) -> Settings:
    shape = _picked(args, SHAPE)
    if getattr(args, "heterogeneous_layers_config_encoded_json", None):
        return {}
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if getattr(args, "group_query_attention", False):
        shape["num_query_groups"] = args.num_query_groups
    if getattr(args, "moe_relu_routing", False):
        # Before there was a flag for it, the router had a bias wherever other linear layers had one.
        shape["moe_relu_router_bias"] = getattr(args, "moe_relu_router_bias", args.add_bias_linear)
    if pattern:
        del shape["num_layers"]
        shape["hybrid_layer_pattern"] = pattern.replace("|", "")
    if not getattr(args, "num_experts", None):
        return shape | {"ffn_hidden_size": args.ffn_hidden_size}
    shape["moe_ffn_hidden_size"] = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if not pattern:
        shape["moe_layer_freq"] = moe_layer_pattern(args)
    has_dense = "-" in pattern if pattern else not all(shape["moe_layer_freq"])
    return shape | {"ffn_hidden_size": args.ffn_hidden_size} if has_dense else shape


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
    before, now = (textwrap.shorten(shown(value), SHOWN, placeholder=" ...") for value in (there, here))
    return f"{flag_of(name)} {before} in the checkpoint, {now} here"


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, float) and isinstance(other, float | int):
        return math.isclose(mine, other, rel_tol=1e-12)
    return bool(mine == other)


def _as_given(value: Any, granularity: int, power: int) -> Any:
    if not isinstance(value, int) or not power:
        return value
    return value // granularity if power > 0 else value * granularity
