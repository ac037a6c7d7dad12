"""Convert between Megatron's arguments and the configuration for transformers."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeConfig
from megatron.remoe.routing.refusals import flag_name, shown

from ...console.errors import ConversionError
from ...recipes.flops import moe_layer_pattern
from ...recipes.megatron_values import make_parser

# The configuration's field → Megatron's argument with the same value.
MODEL = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
}
EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "shared_expert_gate": "moe_shared_expert_gate",
    "moe_relu_routing": "moe_relu_routing",
}
RELU = {
    "moe_relu_load_balancing": "moe_relu_l1_reg_load_balancing",
    "moe_relu_normalize": "moe_relu_normalize",
    "max_experts_per_token": "moe_relu_max_experts",
}
TOPK = {
    "scoring_func": "moe_router_score_function",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "router_expert_bias": "moe_router_enable_expert_bias",
}
# Values for which Megatron has None.
NONE_IN_MEGATRON = {"shared_expert_intermediate_size": 0, "routed_scaling_factor": 1.0}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
ROUTER_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}

# Arguments that must be None, False or as in `REQUIRED_VALUES`: the model for transformers supports nothing else.
UNSET = """rotary_seq_len_interpolation_factor no_rope_freq window_size activation_func_clamp_value
heterogeneous_layers_config_path moe_latent_size moe_router_num_groups moe_expert_capacity_factor
moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size""".split()
# The last three are options of earlier versions.
OFF = """layernorm_zero_centered_gamma rotary_interleaved use_rope_scaling qk_l2_norm add_qkv_bias attention_output_gate
add_bias_linear apply_residual_connection_post_layernorm use_mup moe_apply_probs_on_input multi_latent_attention
moe_relu_router_bias moe_relu_sparse_start qk_layernorm_all_heads""".split()
REQUIRED_VALUES: dict[str, Any] = {
    **{"normalization": "RMSNorm", "position_embedding_type": "rope", "softmax_type": "vanilla", "swiglu": True},
    **{"rotary_percent": 1.0, "glu_linear_offset": 0.0, **dict.fromkeys(UNSET), **dict.fromkeys(OFF, False)},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_baseline_router": (None, "hash"),
}


def complete(saved: argparse.Namespace) -> argparse.Namespace:
    """Return a checkpoint's arguments; missing ones have the defaults of this version."""
    return argparse.Namespace(**(vars(make_parser().parse_args([])) | vars(saved)))


def make_config(args: argparse.Namespace) -> RemoeConfig:
    """Return the configuration for transformers, from complete arguments. With ReLU routing, λ is set to λ₀.

    Raises:
        ConversionError: the model for transformers does not support some arguments; the message names each flag.
    """
    wrong = [name for name, value in REQUIRED_VALUES.items() if getattr(args, name, value) != value]
    wrong += [name for name, values in CHOICES.items() if getattr(args, name, values[0]) not in values]
    if any(name in str(args.moe_router_load_balancing_type) for name in ("sinkhorn", "quantile_balancing")):
        wrong.append("moe_router_load_balancing_type")
    if wrong:
        flags = ", ".join(f"{flag_name(name)} {shown(getattr(args, name))}" for name in wrong)
        raise ConversionError(f"--load: the model for transformers does not support {flags}.", "REMOE-E512")
    table = dict(MODEL)
    fields = {"vocab_size": args.padded_vocab_size, "qk_norm": "head" if args.qk_layernorm else None}
    if args.num_experts:
        table |= EXPERTS | RELU | TOPK
        fields |= _expert_fields(args)
    same = {field: getattr(args, name) for field, name in table.items()}
    fields = {field: value for field, value in same.items() if value is not None} | fields
    if not args.group_query_attention:
        fields["num_key_value_heads"] = args.num_attention_heads
    config = RemoeConfig(
        **fields,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
        dtype=args.params_dtype,
        architectures=["RemoeForCausalLM"],
    )
    # config.json names the classes for environments without this project.
    config.auto_map = {
        "AutoModel": "modeling_remoe.RemoeModel",
        "AutoModelForCausalLM": "modeling_remoe.RemoeForCausalLM",
    }
    if config.max_experts_per_token:
        set_bound(config, config.max_experts_per_token)
    return config


def set_bound(config: RemoeConfig, bound: int) -> None:
    """Limit a model to the K = `bound` largest gates per token. Servers read K; `target_experts_per_token` keeps k."""
    config.target_experts_per_token = config.mean_experts_per_token
    config.max_experts_per_token = config.num_experts_per_tok = bound


def _expert_fields(args: argparse.Namespace) -> dict[str, Any]:
    coefficient = args.moe_relu_l1_reg_coeff_init if args.moe_relu_routing else args.moe_aux_loss_coeff
    is_sigmoid = args.moe_router_score_function == "sigmoid"
    return {
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_gate": bool(args.moe_shared_expert_gate and args.moe_shared_expert_intermediate_size),
        "mlp_only_layers": [layer for layer, has_experts in enumerate(moe_layer_pattern(args)) if not has_experts],
        "norm_topk_prob": not args.moe_relu_routing
        and (args.moe_router_topk > 1 if is_sigmoid else not args.moe_router_pre_softmax),
        "hash_routing": args.moe_baseline_router == "hash",
        "router_dtype": ROUTER_DTYPES[args.moe_router_dtype],
        "router_aux_loss_coef": coefficient if isinstance(coefficient, float) else 0.0,
    }


def make_flags(config: RemoeConfig, seq_length: int) -> list[str]:
    """Return Megatron's flags for a model of this configuration, without the vocabulary.

    Args:
        config: of the model.
        seq_length: tokens of a sequence, for training.

    Raises:
        ConversionError: Megatron has no such model.
    """
    table = dict(MODEL)
    if config.num_experts:
        table |= EXPERTS
        if config.moe_relu_routing:
            table |= RELU
        elif not config.hash_routing:
            table |= TOPK
    same = {field: getattr(config, field) for field in table}
    values = {table[field]: None if NONE_IN_MEGATRON.get(field) == value else value for field, value in same.items()}
    values["moe_router_topk"] = config.mean_experts_per_token if config.num_experts else None
    values |= {"seq_length": seq_length, "hidden_dropout": 0.0, "normalization": "RMSNorm", "swiglu": True}
    values |= {"add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True}
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    values |= {"rotary_base": int(rope["rope_theta"]), "qk_layernorm": config.qk_norm is not None}
    values["untie_embeddings_and_output_weights"] = not config.tie_word_embeddings
    if config.dtype in DTYPES:
        values[DTYPES[config.dtype]] = True
    return make_words(values | (_expert_arguments(config) if config.num_experts else {}))


def _expert_arguments(config: RemoeConfig) -> dict[str, Any]:
    names = {field: name for name, field in ROUTER_DTYPES.items()}
    values: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall", "moe_router_dtype": names[config.router_dtype]}
    if config.mlp_only_layers:  # with a list, checkpoints name each layer, even if all have experts
        layers = range(config.num_hidden_layers)
        values["moe_layer_freq"] = [int(layer not in config.mlp_only_layers) for layer in layers]
    if config.moe_relu_routing:
        return values | {"moe_relu_l1_reg_coeff_init": config.router_aux_loss_coef or None}
    if config.hash_routing:
        values |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
        return values | {"moe_baseline_router": "hash"}
    values |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": config.router_aux_loss_coef}
    if config.scoring_func == "softmax":
        return values | {"moe_router_pre_softmax": None if config.norm_topk_prob else True}
    if config.norm_topk_prob != (config.num_experts_per_tok > 1):
        raise ConversionError(
            "--load: scoring_func sigmoid needs norm_topk_prob true if k > 1, else false.", "REMOE-E512"
        )
    return values


def make_words(values: dict[str, Any]) -> list[str]:
    """Return the flags that set Megatron's arguments to these values; None and switches' defaults are left out."""
    words = []
    for action in make_parser()._actions:
        value = values.get(action.dest)
        if value is None:
            continue
        if action.nargs in ("*", "+") and isinstance(value, list):
            words += [action.option_strings[0], *map(str, value)]
        elif action.nargs != 0:
            words += [action.option_strings[0], str(value).replace(" ", "")]
        elif value == action.default:
            continue
        elif isinstance(action, argparse.BooleanOptionalAction):
            words.append(action.option_strings[0 if value else 1])  # --x or --no-x
        elif value == action.const:
            words.append(action.option_strings[0])
    return words


def vocabulary_flags(config: RemoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return tokenizer flags that give Megatron's embedding the same number of rows."""
    rows = config.vocab_size
    if tokenizer is None:
        return f"--tokenizer-type NullTokenizer --vocab-size {rows} --make-vocab-size-divisible-by 1".split()
    least = max(1, rows - len(tokenizer) + 1)
    divisor = next(divisor for divisor in range(least, rows + 1) if rows % divisor == 0)
    return [
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer.name_or_path),
        *("--make-vocab-size-divisible-by", str(divisor)),
    ]


def parse_flags(flags: Sequence[str], config: RemoeConfig) -> argparse.Namespace:
    """Return Megatron's arguments for the flags of a model with this configuration, as a run would save them."""
    args = make_parser().parse_args(flags)
    args.padded_vocab_size = config.vocab_size
    args.params_dtype = config.dtype or torch.float32
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = args.iteration = 0
    return args
