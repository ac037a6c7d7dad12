"""List the arguments that a run is compared by with the checkpoint that it resumes from."""

import argparse
import math
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.refusals import flag as flag_of
from megatron.remoe.routing.refusals import shown

# The weights' shapes depend on these, and on what `shape` adds.
SHAPE = """
num_layers hidden_size num_attention_heads kv_channels num_experts moe_shared_expert_intermediate_size swiglu
add_bias_linear normalization untie_embeddings_and_output_weights mtp_num_layers mtp_use_repeated_layer
multi_latent_attention add_qkv_bias qk_layernorm qk_layernorm_all_heads moe_shared_expert_gate
""".split()
DATA = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
# Other settings that change a training's result; the learning rate's schedule is compared separately.
RESULT = """
seed split mock_data dataloader_type seq_length global_batch_size step_batch_size_schedule reset_position_ids
reset_attention_mask eod_mask_loss calculate_per_token_loss optimizer adam_beta1 adam_beta2 adam_eps sgd_momentum
clip_grad bf16 fp16 decoupled_lr decoupled_min_lr attention_dropout hidden_dropout init_method_std
init_method_xavier_uniform layernorm_epsilon position_embedding_type rotary_base rotary_percent window_size
rotary_interleaved rotary_scaling_factor use_rope_scaling rope_scaling_factor no_rope_freq softmax_type qk_l2_norm
squared_relu quick_geglu apply_layernorm_1p mtp_loss_scaling_factor mtp_detach_heads teacher_weight
rotary_seq_len_interpolation_factor apply_residual_connection_post_layernorm fp32_residual_connection glu_linear_offset
activation_func_clamp_value openai_gelu window_attn_skip_freq use_mup apply_wd_to_qk_layernorm qk_clip
no_weight_decay_cond_type
""".split()
RESULT_OF_EXPERTS = """
moe_router_topk moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_router_dtype
moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor moe_router_num_groups
moe_router_group_topk moe_router_enable_expert_bias moe_router_bias_update_rate moe_input_jitter_eps
moe_expert_capacity_factor moe_token_drop_policy moe_pad_expert_input_to_capacity moe_apply_probs_on_input
moe_warmup_topk moe_warmup_steps moe_baseline_router
""".split()
# ReLU routing's own settings, except two that change no result and one that is part of the shape.
RESULT_OF_RELU = [
    field.name
    for field in fields(ReMoEConfig)
    if field.name.startswith("moe_relu_") and field.name not in ("moe_relu_activation_limit",)
]
# Megatron identifies parameter groups in a checkpoint by these.
RATES = ["lr", "min_lr"]
# Megatron compares these after building and loading everything.
SCHEDULE = """
lr_decay_style lr_warmup_iters lr_warmup_samples lr_warmup_fraction lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters
lr_wsd_decay_samples weight_decay weight_decay_incr_style start_weight_decay end_weight_decay
""".split()
DURATION = ["train_iters", "lr_decay_iters", "train_samples", "lr_decay_samples", "global_batch_size"]
LAYOUT = """
tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size
expert_model_parallel_size expert_tensor_parallel_size
""".split()
# Settings that default to a function of another one: not reported if that one differs.
FOLLOWS = {"kv_channels": "hidden_size", "moe_layer_freq": "num_layers", "lr_decay_iters": "train_iters"}
FOLLOWS |= {"expert_tensor_parallel_size": "tensor_model_parallel_size"}
FOLLOWS |= dict.fromkeys(("start_weight_decay", "end_weight_decay"), "weight_decay")
# Options of version 0.1 that only it can continue with, and their defaults.
REMOVED_OPTIONS: dict[str, Any] = dict.fromkeys(("moe_relu_router_bias", "moe_relu_sparse_start"), False) | {
    "moe_relu_l1_reg_start_power": 1,
    "moe_relu_l1_reg_coeff_min": 0.0,
    "moe_relu_l1_reg_coeff_max": 0.0,
    "moe_relu_start_topk": None,
}
MULTIPLIED = ("num_experts", "moe_router_topk", "moe_warmup_topk", "moe_relu_max_experts")
FOLLOWS |= dict.fromkeys((*MULTIPLIED, "moe_ffn_hidden_size"), "moe_granularity")
SHOWN = 120  # characters of a setting, for example of a list of data sets
Settings = dict[str, Any]


def moe_layer_pattern(args: argparse.Namespace) -> list[int]:
    """Return --moe-layer-freq of a GPTModel as Megatron reads it: a 1 for each layer with experts, 0 for others.

    Args:
        args: Megatron's, or those saved in a checkpoint; older ones lack the flag.
    """
    frequency: int | list[int] = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(args.num_layers)]
    return frequency


def result(args: argparse.Namespace) -> Settings:
    """Return the settings that change the result; data sets by name, because they may have been moved."""
    names = RESULT + (RESULT_OF_EXPERTS if getattr(args, "num_experts", None) else [])
    found = picked(args, names + (RESULT_OF_RELU if getattr(args, "moe_relu_routing", False) else []))
    if getattr(args, "step_batch_size_schedule", None):
        del found["global_batch_size"]  # Megatron derives one from the number of GPUs
    found |= {name: of and Path(of).name for name, of in picked(args, ["teacher"]).items()}
    for name, words in picked(args, list(DATA)).items():
        words = [words] if isinstance(words, str) else words or []
        found[name] = [_weight_or_name(word) for word in words]
    return found


def _weight_or_name(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return Path(word).name


def shape(args: argparse.Namespace) -> Settings:
    """Return the settings that determine the shapes of the weights."""
    found = picked(args, SHAPE)
    if getattr(args, "heterogeneous_layers_config_encoded_json", None):
        return {}
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if getattr(args, "group_query_attention", False):
        found["num_query_groups"] = args.num_query_groups
    if getattr(args, "moe_relu_routing", False):
        found |= {name: getattr(args, name, default) for name, default in REMOVED_OPTIONS.items()}
    if pattern:
        del found["num_layers"]
        found["hybrid_layer_pattern"] = pattern.replace("|", "")
    if not getattr(args, "num_experts", None):
        return found | {"ffn_hidden_size": args.ffn_hidden_size}
    found["moe_ffn_hidden_size"] = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if not pattern:
        # With 1, checkpoints hold one tensor for all layers; with a list, even of ones, one for each.
        found["moe_layer_freq"] = 1 if getattr(args, "moe_layer_freq", 1) == 1 else moe_layer_pattern(args)
    has_dense = "-" in pattern if pattern else not all(moe_layer_pattern(args))
    return found | {"ffn_hidden_size": args.ffn_hidden_size} if has_dense else found


def duration(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the samples until the end of the training and until the end of the learning rate's decay."""
    if getattr(args, "train_iters", None) and not getattr(args, "train_samples", None):
        decay = getattr(args, "lr_decay_iters", None) or args.train_iters
        return args.train_iters * args.global_batch_size, decay * args.global_batch_size
    samples = getattr(args, "train_samples", None)
    return samples, getattr(args, "lr_decay_samples", None) or samples


def differences(
    args: argparse.Namespace, saved: argparse.Namespace, settings: list[str] | Callable[[argparse.Namespace], Settings]
) -> str:
    """Return the settings that differ as flags with both values, or "".

    Args:
        args, saved: of this run and of the checkpoint; settings that only one of them has are skipped.
        settings: the names to compare, or a function that returns what to compare.
    """
    here, there = (picked(each, settings) if isinstance(settings, list) else settings(each) for each in (args, saved))
    names = [name for name in here if name in there and not _same(here[name], there[name])]
    granularities = getattr(args, "moe_granularity", 1), getattr(saved, "moe_granularity", 1)
    if names and granularities[0] != granularities[1]:
        names = ["moe_granularity", *names]
        here["moe_granularity"], there["moe_granularity"] = granularities
    return "; ".join(
        f"{flag_of(name)} {_short(there[name])} in the checkpoint, {_short(here[name])} here"
        for name in names
        if FOLLOWS.get(name) not in names
    )


def picked(args: argparse.Namespace, names: list[str]) -> Settings:
    """Return the settings with these names; older checkpoints do not have all of them."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, float) and isinstance(other, float | int):
        return math.isclose(mine, other, rel_tol=1e-12)
    return bool(mine == other)


def _short(value: Any) -> str:
    return textwrap.shorten(shown(value), SHOWN, placeholder=" ...")
