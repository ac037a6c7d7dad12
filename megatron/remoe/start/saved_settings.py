"""Compare this run's settings with those saved in the checkpoint that it resumes from, before anything starts.

Megatron sorts its settings into configurations (`PretrainConfigContainer`) and its flags into groups. This module
compares those of the model, the optimizer, the schedule and the data, including future ones. It leaves out settings
that also belong to a configuration of layout or output, and those that change only speed or memory (`SAME_RESULT`).
"""

import argparse
import math
import sys
import textwrap
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.remoe.files.errors import UsageError
from megatron.remoe.routing.config import ReMoEConfig, ReMoEMLAConfig
from megatron.remoe.routing.refusals import flag_name, shown
from megatron.remoe.start.checkpoint_files import RELEASE, TRACKER, Resume, newest_complete
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError
from megatron.training.arguments import add_megatron_arguments
from megatron.training.config import PretrainConfigContainer

# Configurations in Megatron's container. The model and the scheduler have their own rules.
COMPARED = ("optimizer", "rng")
NOT_COMPARED = ("ddp", "dist", "logger", "checkpoint", "profiling", "validation", "tokenizer")
# Groups of flags that are missing from the configurations, or have different names there.
FLAG_GROUPS = ("network size", "moe", "data and dataloader")
# Also compared: the kind of optimizer state, and settings of the training loop and of precision.
ALWAYS_COMPARED = {"use_distributed_optimizer", "bf16", "fp16", "dataloader_type"}
ALWAYS_COMPARED |= {"global_batch_size", "step_batch_size_schedule"}
# Settings of each group that change only speed or memory, or repeat a different setting. All others are compared, so a
# new one of Megatron's is.
SAME_RESULT = {
    "model": """
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split activation_offload_fraction
        apply_rope_fusion attention_backend bias_activation_fusion bias_dropout_fusion cache_mla_latents
        config_logger_dir cp_comm_type cuda_graph_impl cuda_graph_modules cuda_graph_retain_backward_graph
        cuda_graph_scope cuda_graph_use_single_mempool cuda_graph_warmup_steps delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks disable_parameter_transpose_cache distribute_saved_activations
        dsa_kernel_backend enable_cuda_graph external_cuda_graph fine_grained_activation_offloading
        fine_grained_offloading_max_inflight_offloads fused_residual_rmsnorm fused_single_qkv_rope
        high_priority_a2a_comm_stream inference_cuda_graph_scope inference_disable_triton_nvls_kernels
        inference_fuse_tp_communication inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type inference_rng_tracker inference_sampling_seed init_model_with_meta_device
        is_hybrid_model kitchen_attention_backend masked_softmax_fusion min_offloaded_tensor_size mla_down_proj_fusion
        moe_deepep_num_sms moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms moe_grouped_gemm
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms
        moe_hybridep_num_sms_preprocessing moe_hybridep_pad_uneven_dispatch_inputs moe_kernels moe_layer_recompute
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_pad_experts_for_cuda_graph_inference moe_paged_stash
        moe_paged_stash_buffer_size_factor_cpu moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size
        moe_per_layer_logging moe_permute_fusion moe_permute_fusion_into_hybridep moe_relu_activation_limit
        moe_router_fusion moe_shared_expert_overlap moe_token_dispatcher_type num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage offload_modules pipeline_model_parallel_layout recompute_granularity
        recompute_method recompute_modules recompute_num_layers tp_comm_overlap_cfg transformer_impl
        use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
        use_inference_optimized_layers use_transformer_engine_op_fuser
    """,
    "optimizer": """
        optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d
        overlap_param_gather_with_optimizer_step use_torch_optimizer_for_cpu_offload
    """,
    "rng": "inference_rng_tracker",
    "network size": "decoder_num_layers encoder_num_layers",
    "data and dataloader": """
        create_attention_mask_in_dataloader data_cache_path dataloader_defer_npy_index_mmap dataloader_fast_cache_load
        decoder_seq_length encoder_seq_length mmap_bin_files num_dataset_builder_threads num_workers
        object_storage_cache_path test_data_path valid_data_path
    """,
}
L1 = {"moe_relu_l1_reg_coeff_init", "moe_relu_l1_reg_coeff_multiplier"}  # a checkpoint has n of λ = λ₀ · αⁿ
ROUTER = {"moe_relu_routing", "moe_relu_normalize"}  # they change the router's weights
RATES = {"lr", "min_lr"}  # Megatron identifies parameter groups in a checkpoint by these
ENDS = {"lr_decay_iters", "lr_decay_samples"}  # compared as samples
# Validation replaces the words of these flags by dtypes; converted checkpoints still have the words.
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "fp8"}
SHOWN = 120  # most characters of a setting in a message, for example of a list of data sets


def check_loaded_run(args: argparse.Namespace, resume: Resume | None) -> bool:
    """Refuse to resume with changed settings, and to overwrite newer checkpoints.

    Args:
        args: Megatron's arguments, validated and with the size of the tokenizer's vocabulary.
        resume: the checkpoint to resume from; None if the run starts from random weights.

    Returns:
        Whether the run continues with the same learning rates to a different end. The caller then has to set
        `args.override_opt_param_scheduler`: Megatron refuses a different end, because weight decay can depend on it.

    Raises:
        UsageError: a setting differs, newer checkpoints would be overwritten, or --load has none.
    """
    trains = not (args.finetune or args.skip_train)
    continues = resume is not None and trains and resume.folder.name != RELEASE and resume.flag == "--load"
    if args.save and not args.skip_train and "://" not in f"{args.save} {args.load}":
        _refuse_overwriting(args, int(resume.folder.name.removeprefix("iter_")) if resume and continues else -1)
    if resume is None:
        _check_checkpoint_exists(args)
    if resume is None or resume.saved is None:
        return False
    given = f"{resume.flag} {resume.folder}"
    has_exponent = getattr(resume.saved, "consumed_train_samples", 0)  # also a release, if it was trained
    saved = argparse.Namespace(**dict.fromkeys(ROUTER, False) | vars(resume.saved))
    fixed = ROUTER | (L1 if has_exponent and not args.skip_train else set())
    if getattr(saved, "moe_relu_sparsity_scope", "model") == "layer":  # each layer has a different n
        fixed.add("moe_relu_sparsity_scope")
    if any(resume.folder.glob("mp_rank_*")):  # Megatron loads what it finds, and leaves other weights random
        fixed.add("local_layer_fusion")
    if different := differences(args, saved, fixed):
        raise UsageError(
            f"{given}: {different}. Give the checkpoint's values (--finetune needs them too), or run remoe convert.",
            "REMOE-E413",
        )
    if not continues:
        return False
    if (padding := differences(args, resume.saved, {"padded_vocab_size"})) and args.rank == 0:
        print(f"{given}: different padding changes the loss slightly: {padding}.", file=sys.stderr, flush=True)
    names = RATES if args.allow_changed_settings else result_settings(args.multi_latent_attention)
    if different := differences(args, resume.saved, names - RATES if args.no_load_optim else names):
        raise UsageError(
            f"{given}: settings differ from the checkpoint's: {different}. Give the checkpoint's values, or a "
            "different --save and --load, or --allow-changed-settings to resume anyway (for rates with "
            "--no-load-optim), or --finetune with a different --save to start a new run from its weights.",
            "REMOE-E413",
        )
    if args.no_load_optim or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return False
    (here, decay_here), (there, decay_there) = _samples(args), _samples(resume.saved)
    if decay_here != decay_there or differences(args, resume.saved, schedule_settings()):
        return False  # Megatron refuses a different schedule
    return here != there and args.weight_decay_incr_style == "constant"


def result_settings(is_latent: bool) -> set[str]:
    """Return the names of the settings that change a run's result, with MLA or not, except for the schedule."""
    names = set().union(*setting_groups(is_latent).values())
    return names - {*" ".join(SAME_RESULT.values()).split()} | ALWAYS_COMPARED


def setting_groups(is_latent: bool) -> dict[str, set[str]]:
    """Return the names in each of Megatron's groups of settings that this module compares.

    Raises:
        UsageError: Megatron has no such group, so its settings would not be compared.
    """
    kinds = typing.get_type_hints(PretrainConfigContainer)
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    flags = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    if missing := ({*COMPARED, *NOT_COMPARED} - {*kinds}) | ({*FLAG_GROUPS} - {*flags}):
        raise UsageError(
            f"This megatron-core has no settings named {', '.join(sorted(missing))}, so a changed one would not be "
            "noticed. Install the version that requirements.txt names."
        )
    models = {*_names(ReMoEMLAConfig if is_latent else ReMoEConfig), *_names(*typing.get_args(kinds["model"]))}
    groups = {"model": models - {*_names(ModelParallelConfig)}}
    groups |= {name: {*_names(kinds[name])} for name in COMPARED} | {title: flags[title] for title in FLAG_GROUPS}
    elsewhere = {*_names(*(kinds[name] for name in (*NOT_COMPARED, "scheduler"))), "weight_decay"}
    return {title: names - elsewhere for title, names in groups.items()}


def schedule_settings() -> set[str]:
    """Return the names of the settings that define the schedules of learning rate and weight decay."""
    names = {*_names(typing.get_type_hints(PretrainConfigContainer)["scheduler"]), "weight_decay"}
    return {name for name in names - ENDS if not name.endswith("opt_param_scheduler")}


def _names(*configurations: Any) -> list[str]:
    return [field.name for configuration in configurations for field in fields(configuration)]


def differences(args: argparse.Namespace, saved: argparse.Namespace, names: set[str]) -> str:
    """Return the settings that differ, as flags with both values, or "".

    Args:
        args, saved: arguments of this run and of the checkpoint; settings that only one of them has are skipped.
        names: the settings to compare.
    """
    if getattr(args, "step_batch_size_schedule", None):
        names = names - {"global_batch_size"}  # Megatron derives one from the number of GPUs
    if getattr(args, "hybrid_layer_pattern", None) and not getattr(saved, "hybrid_layer_pattern", None):
        names = names - {"hybrid_layer_pattern", "num_layers"}  # a HybridModel can load a GPTModel's checkpoint
    if not getattr(args, "group_query_attention", False):
        names = names - {"num_query_groups"}  # Megatron's FLOPs count changes it during the run
    divisors = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    if "seed" in names and all(getattr(args, name) == getattr(saved, name, None) for name in divisors):
        names = names | {"padded_vocab_size"}  # Megatron would cut or fill the embeddings
    lines = []
    for name in sorted(names):
        if hasattr(args, name) and hasattr(saved, name):
            there, here = _comparable(getattr(saved, name)), _comparable(getattr(args, name))
            if not _is_same(here, there):
                lines.append(f"{flag_name(name)} {_short(there)} in the checkpoint, {_short(here)} here")
    return "; ".join(lines)


def _samples(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the samples until the end of the run and until the end of the learning rate's decay."""
    samples = args.train_samples or args.train_iters * args.global_batch_size
    decay = args.lr_decay_samples or (args.lr_decay_iters or 0) * args.global_batch_size
    return samples, decay or samples


def _comparable(value: Any) -> Any:
    """Return a value that can be compared: a path's name, as data may have moved; a layer pattern without stages."""
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    if not isinstance(value, str):
        return DTYPES.get(value, value) if isinstance(value, torch.dtype) else value
    try:
        return float(value)
    except ValueError:
        return Path(value).name.replace("|", "")


def _is_same(mine: Any, other: Any) -> bool:
    if isinstance(mine, float) and isinstance(other, float | int):
        return math.isclose(mine, other, rel_tol=1e-12)
    return bool(mine == other)


def _short(value: Any) -> str:
    return textwrap.shorten(shown(value), SHOWN, placeholder=" ...")


def _refuse_overwriting(args: argparse.Namespace, start: int) -> None:
    """Refuse to overwrite newer complete checkpoints in --save. If --load is the same folder, only print a warning."""
    newest = newest_complete(Path(args.save), above=start)
    if newest is None:
        return
    given = f"--save {args.save}: holds iteration {newest}, which this run would overwrite."
    if args.load and Path(args.load).resolve() == Path(args.save).resolve() and not args.finetune:
        if args.rank == 0:  # --ckpt-step goes back on purpose
            print(given, file=sys.stderr, flush=True)
        return
    raise UsageError(
        f"{given} To continue it, give --load {args.save} without --finetune. Otherwise give a different --save; "
        "with --pretrained-checkpoint instead of --finetune, the same command starts and resumes.",
        "REMOE-E407",
    )


def _check_checkpoint_exists(args: argparse.Namespace) -> None:
    """Refuse to start from random weights if a checkpoint is missing, except at a first start with --load as --save."""
    flag = "--pretrained-checkpoint" if args.pretrained_checkpoint else "--load"
    folder = args.pretrained_checkpoint or args.load
    is_elsewhere = "://" in f"{args.pretrained_checkpoint} {args.load}"
    if not folder or is_elsewhere or args.non_persistent_save_interval or args.non_persistent_global_ckpt_dir:
        return
    first_start = flag == "--load" and args.save and Path(args.save).resolve() == Path(folder).resolve()
    if not first_start or args.finetune or args.exit_on_missing_checkpoint:
        raise BrokenCheckpointError(
            f"{flag} {folder}: holds no checkpoint (there is no {TRACKER}). Give a run's --save, or leave "
            f"{flag} out to start from random weights.",
            "REMOE-E404",
        )
