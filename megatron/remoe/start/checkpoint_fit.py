"""Compare the flags with the arguments saved in the checkpoint, before anything starts."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from megatron.remoe.files.errors import UsageError
from megatron.remoe.start.checkpoint_files import (
    RELEASE,
    TRACKER,
    Resume,
    choose_checkpoint,
    iteration_folder,
    newest_whole,
)
from megatron.remoe.start.checkpoint_index import INDEX, BrokenCheckpointError, common_state
from megatron.remoe.start.compared_settings import (
    DURATION,
    LAYOUT,
    RATES,
    SCHEDULE,
    differences,
    duration,
    result,
    shape,
)

FSDP = "fsdp_dtensor"
STRICT = ("assume_ok_unexpected", "raise_unexpected", "raise_all")  # values of --dist-ckpt-strictness


def check_has_no_code(args: argparse.Namespace) -> None:
    """Refuse checkpoints with an index or settings that could run code. Call it before Megatron reads the settings.

    Raises:
        BrokenCheckpointError: names flag and file.
    """
    for flag, root in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        folder = iteration_folder(Path(root), args.ckpt_step) if root else None
        if folder is None or not (folder / INDEX).is_file():
            continue
        try:
            common_state(folder)
        except BrokenCheckpointError as error:
            raise BrokenCheckpointError(f"{flag}: {error}. Give an earlier iteration with --ckpt-step.") from error


def check_loaded_run(args: argparse.Namespace, resume: Resume | None = None) -> bool:
    """Refuse a checkpoint that Megatron would refuse late, or that would silently continue as a different training.

    Args:
        args: Megatron's arguments, validated.
        resume: the checkpoint to resume from, if it was chosen already.

    Returns:
        Whether the training continues with the same learning rates to another end. The caller then has to set
        `args.override_opt_param_scheduler`: Megatron refuses another end, because weight decay can depend on it.

    Raises:
        UsageError: names the flag, both values and the remedy.
    """
    resume = resume or choose_checkpoint(args)
    goes_on = _goes_on(args, resume)
    if args.save and not args.skip_train and "://" not in f"{args.save} {args.load}":
        _check_keeps_saved(args, int(resume.folder.name.removeprefix("iter_")) if resume and goes_on else -1)
    if resume is None:
        _check_is_there(args)
    if resume is None or resume.saved is None:
        return False
    for checks in (_model_problems, _training_problems) if goes_on else (_model_problems,):
        for code, problem in checks(args, resume.saved):
            raise UsageError(f"{resume.flag} {resume.folder}{problem}", code)
    is_other_end = duration(args)[0] != duration(resume.saved)[0] and args.weight_decay_incr_style == "constant"
    return bool(goes_on and _compares_schedules(args) and is_other_end)


def _goes_on(args: argparse.Namespace, resume: Resume | None) -> bool:
    """Return whether the training of a checkpoint continues."""
    trains = not (args.finetune or args.skip_train)
    return resume is not None and trains and resume.folder.name != RELEASE and resume.flag == "--load"


def check_loaded_vocabulary(args: argparse.Namespace, resume: Resume | None) -> None:
    """Refuse to resume with another vocabulary, once the tokenizer is built: Megatron would cut or fill embeddings.

    Raises:
        UsageError: names both sizes.
    """
    if resume is None or resume.saved is None or args.allow_changed_settings or not _goes_on(args, resume):
        return
    padding = ["make_vocab_size_divisible_by", "tensor_model_parallel_size"]
    different = differences(args, resume.saved, ["padded_vocab_size"])
    if different and not differences(args, resume.saved, padding):
        raise UsageError(
            f"--load {resume.folder}: was saved with another vocabulary: {different}. Give its tokenizer.", "REMOE-E413"
        )


@torch.no_grad()
def check_is_finite(source: str, chunk: torch.nn.Module) -> None:
    """Check that all weights of a model chunk are finite.

    Args:
        source: flag and folder that they were loaded from.
        chunk: the model, or a part of it.

    Raises:
        UsageError: names the first weight that is not, and the remedy.
    """
    finite = {
        name: torch.isfinite(weight.to_local() if isinstance(weight, DTensor) else weight).all()
        for name, weight in chunk.named_parameters()
    }
    if not finite or torch.stack(list(finite.values())).all():
        return
    name = next(name for name, value in finite.items() if not value).removeprefix("module.").removeprefix("module.")
    raise UsageError(
        f"{source}: {name} holds values that are not finite. Go back to an earlier iteration with --ckpt-step.",
        "REMOE-E406",
    )


def _check_keeps_saved(args: argparse.Namespace, start: int) -> None:
    """Refuse to overwrite whole checkpoints in --save that are newer than the start, or say so if --load is --save."""
    newest = newest_whole(Path(args.save), above=start)
    if newest is None:
        return
    given = f"--save {args.save}: holds iteration {newest}, which this training would overwrite."
    has_same_load = args.load and Path(args.load).resolve() == Path(args.save).resolve()
    if has_same_load and not args.finetune:  # --ckpt-step goes back on purpose
        if args.rank == 0:
            print(given, file=sys.stderr, flush=True)
        return
    remedy = f"Continue from it with --load {args.save}{' and without --finetune' if args.finetune else ''}"
    if args.finetune and args.load and not has_same_load:
        remedy += f" (with --pretrained-checkpoint {args.load}, one command starts and resumes)"
    raise UsageError(f"{given} {remedy}, or choose another folder.", "REMOE-E407")


def _check_is_there(args: argparse.Namespace) -> None:
    """Refuse to start from random weights, as Megatron does if it finds no checkpoint, except at a first start."""
    places = {"--pretrained-checkpoint": args.pretrained_checkpoint, "--load": args.load}
    given = {flag: folder for flag, folder in places.items() if folder}
    is_elsewhere = any("://" in folder for folder in given.values())
    if not given or is_elsewhere or args.non_persistent_save_interval or args.non_persistent_global_ckpt_dir:
        return
    flag, folder = next(iter(given.items()))
    first_start = flag == "--load" and args.save and Path(args.save).resolve() == Path(folder).resolve()
    if not first_start or args.finetune or args.exit_on_missing_checkpoint:
        raise BrokenCheckpointError(
            f"{flag} {folder}: holds no checkpoint (there is no {TRACKER}). Give what a training had under --save, or "
            f"leave {flag} out to start from random weights.",
            "REMOE-E404",
        )


def _model_problems(args: argparse.Namespace, saved: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield codes with the reasons why the weights do not fit this model."""
    if problem := _kind_problem(args, saved):
        yield "REMOE-E412", problem
    there, here = _expert_naming(saved), _expert_naming(args)
    if args.use_megatron_fsdp and args.num_experts and there != here:
        yield (
            "REMOE-E412",
            f" holds {there}, whose weights have other names there than {here}. Give its --transformer-impl and "
            "--no-local-layer-fusion.",
        )
    if different := differences(args, saved, shape):
        yield "REMOE-E411", f" holds a model of another shape: {different}. Give its values, or another model."


def _kind_problem(args: argparse.Namespace, saved: argparse.Namespace) -> str:
    """Return why the checkpoint's format, routing or class does not fit, or ""."""
    was_relu, experts = getattr(saved, "moe_relu_routing", False), getattr(saved, "num_experts", None)
    here, there = args.hybrid_layer_pattern, getattr(saved, "hybrid_layer_pattern", None)
    was_fsdp = getattr(saved, "ckpt_format", None) == FSDP
    if was_fsdp != args.use_megatron_fsdp:
        remedy = "Add the flag, or use remoe convert --from-fsdp" if was_fsdp else "Leave out the flag"
        return (
            f" is of a training {'with' if was_fsdp else 'without'} --use-megatron-fsdp, whose checkpoints have "
            f"another format ({FSDP}). {remedy}."
        )
    if args.dist_ckpt_strictness in STRICT and args.moe_relu_routing and not was_relu:
        return (
            f" holds a {'top-k MoE' if experts else 'dense'} model, from which --moe-relu-routing cannot start: "
            "remoe convert makes a ReMoE of it."
        )
    if args.dist_ckpt_strictness in STRICT and was_relu and not args.moe_relu_routing and not args.finetune:
        return " holds a ReMoE: add --moe-relu-routing, or --finetune to start another model from it."
    # Megatron reads GPTModel's checkpoints into a HybridModel where all layers are alike, and none the other way.
    if there and not here:
        return (
            f" holds a HybridModel: add --hybrid-layer-pattern '{there}', or make a GPTModel's checkpoint of it "
            "with remoe convert --model gpt."
        )
    if here and not there and {"E", "-"} <= set(here):
        return (
            " holds a GPTModel, which Megatron reads into a HybridModel only where its layers are all alike, and "
            f"--hybrid-layer-pattern {here} has - and E: use remoe convert --model hybrid."
        )
    return ""


def _training_problems(args: argparse.Namespace, saved: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield codes with the reasons why this would be a different training from the saved one."""
    rates = "" if args.no_load_optim else differences(args, saved, RATES)
    settings = "" if args.allow_changed_settings else differences(args, saved, result)
    if different := "; ".join(filter(None, (rates, settings))):
        meant = "" if rates else "--allow-changed-settings where this is meant, or "
        yield (
            "REMOE-E413",
            f": resuming with other settings than it was saved with: {different}. Give its values, or another --save "
            f"and --load, or {meant}--finetune with another --save to start a new training from its weights.",
        )
    if not args.no_load_optim and (problem := _optimizer_problem(args, saved)):
        yield "REMOE-E414", f": {problem}, or give --no-load-optim to go on with new optimizer state."
    same_end = duration(args)[1] == duration(saved)[1]
    schedule = SCHEDULE if same_end else DURATION + SCHEDULE
    if _compares_schedules(args) and (different := differences(args, saved, schedule)):
        yield (
            "REMOE-E415",
            f": the learning rate would follow another schedule than before: {different}. Give its values, or "
            "--override-opt_param-scheduler to follow the flags, or --use-checkpoint-opt_param-scheduler to follow "
            "the checkpoint.",
        )


def _optimizer_problem(args: argparse.Namespace, saved: argparse.Namespace) -> str:
    """Return why the optimizer's state does not fit, or "".

    Each rank saves its own part of a distributed optimizer; Megatron loads the parts into another layout in some cases
    only.
    """
    if getattr(saved, "no_save_optim", False):
        return "it holds no optimizer state. Load one that does"
    was_distributed = getattr(saved, "use_distributed_optimizer", False)
    if was_distributed != args.use_distributed_optimizer:
        kind, remedy = ("that", "Add it") if was_distributed else ("not that", "Leave it out")
        return f"its optimizer state is {kind} of --use-distributed-optimizer. {remedy}"
    if args.use_megatron_fsdp or not was_distributed or getattr(saved, "dist_ckpt_optim_fully_reshardable", False):
        return ""
    only_for = "without --dist-ckpt-optim-fully-reshardable the distributed optimizer's state was saved for"
    if args.hybrid_layer_pattern and not getattr(saved, "hybrid_layer_pattern", None):
        return f"{only_for} GPTModel alone. Save once more with the flag"
    was_fused = getattr(saved, "local_layer_fusion", False) and getattr(saved, "transformer_impl", "") == "local"
    if args.num_experts and was_fused != (args.local_layer_fusion and args.transformer_impl == "local"):
        kind, remedy = ("grouped experts", "Leave out") if was_fused else ("experts one by one", "Add")
        return f"{only_for} {kind}. {remedy} --no-local-layer-fusion"
    if different := differences(args, saved, LAYOUT):
        return f"{only_for} its layout alone: {different}. Save once more in that layout with the flag"
    return ""


def _expert_naming(args: argparse.Namespace) -> str:
    if args.transformer_impl != "local":
        return "Transformer Engine's layers"
    return "grouped experts" if getattr(args, "local_layer_fusion", False) else "experts one by one"


def _compares_schedules(args: argparse.Namespace) -> bool:
    return not (args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler)
