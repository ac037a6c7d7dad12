"""Convert between Megatron's arguments and the configuration for transformers."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron.remoe.hf import RemoeConfig
from megatron.remoe.routing.refusals import flag, shown
from megatron.remoe.training.arguments import add_remoe_arguments
from megatron.training.arguments import add_megatron_arguments

from ...console.errors import ConversionError
from ..hybrid import moe_layer_pattern

# Megatron's arguments that must have this value.
UNSET = """rotary_seq_len_interpolation_factor no_rope_freq window_size activation_func_clamp_value
heterogeneous_layers_config_path moe_latent_size moe_router_num_groups moe_expert_capacity_factor
moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size""".split()
OFF = """layernorm_zero_centered_gamma rotary_interleaved use_rope_scaling qk_l2_norm add_qkv_bias attention_output_gate
add_bias_linear apply_residual_connection_post_layernorm use_mup moe_apply_probs_on_input moe_relu_router_bias
moe_relu_sparse_start""".split()
ONLY: dict[str, Any] = {
    **{"normalization": "RMSNorm", "position_embedding_type": "rope", "softmax_type": "vanilla", "swiglu": True},
    **{"rotary_percent": 1.0, "glu_linear_offset": 0.0, **dict.fromkeys(UNSET), **dict.fromkeys(OFF, False)},
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_baseline_router": (None, "hash"),
}
# Of latent attention: without its norms there is no class in transformers, and YaRN is not converted.
ONLY_LATENT = {"qk_layernorm": True, "rotary_scaling_factor": 1.0}
# The configuration's field → Megatron's argument.
LATENT = {
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
ROUTER_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}


def complete(saved: argparse.Namespace) -> argparse.Namespace:
    """Return a checkpoint's arguments; missing ones have the defaults of this version."""
    return argparse.Namespace(**(vars(_parser().parse_args([])) | vars(saved)))


def config_of(args: argparse.Namespace) -> RemoeConfig:
    """Return the configuration for transformers of complete arguments. With ReLU routing, λ is λ₀.

    Raises:
        ConversionError: the model for transformers does not support it; the message names each flag.
    """
    only = ONLY | (ONLY_LATENT if args.multi_latent_attention else {})
    wrong = [name for name, value in only.items() if getattr(args, name, value) != value]
    wrong += [name for name, values in CHOICES.items() if getattr(args, name, values[0]) not in values]
    if any(name in str(args.moe_router_load_balancing_type) for name in ("sinkhorn", "quantile_balancing")):
        wrong.append("moe_router_load_balancing_type")
    if wrong:
        flags = ", ".join(f"{flag(name)} {shown(getattr(args, name))}" for name in wrong)
        raise ConversionError(f"--load: the model for transformers does not support {flags}.", "REMOE-E512")
    config = RemoeConfig(
        vocab_size=args.padded_vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        **_attention(args),
        max_position_embeddings=args.max_position_embeddings,
        rms_norm_eps=args.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(args.rotary_base)},
        initializer_range=args.init_method_std,
        attention_dropout=args.attention_dropout,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=None,
        dtype=args.params_dtype,
        architectures=["RemoeForCausalLM"],
        **(_experts(args) if args.num_experts else {}),
    )
    # config.json names the classes for environments without this project.
    config.auto_map = {
        "AutoModel": "modeling_remoe.RemoeModel",
        "AutoModelForCausalLM": "modeling_remoe.RemoeForCausalLM",
    }
    return config


def _attention(args: argparse.Namespace) -> dict[str, Any]:
    if args.multi_latent_attention:
        return {field: getattr(args, name) for field, name in LATENT.items()}
    return {"qk_norm": ("all_heads" if args.qk_layernorm_all_heads else "head") if args.qk_layernorm else None}


def _experts(args: argparse.Namespace) -> dict[str, Any]:
    coefficient = args.moe_relu_l1_reg_coeff_init if args.moe_relu_routing else args.moe_aux_loss_coeff
    is_sigmoid = args.moe_router_score_function == "sigmoid"
    return {
        "num_experts": args.num_experts,
        "num_experts_per_tok": args.moe_router_topk,
        "moe_intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size or 0,
        "shared_expert_gate": bool(args.moe_shared_expert_gate and args.moe_shared_expert_intermediate_size),
        "mlp_only_layers": [layer for layer, has_experts in enumerate(moe_layer_pattern(args)) if not has_experts],
        "moe_relu_routing": args.moe_relu_routing,
        "moe_relu_load_balancing": args.moe_relu_l1_reg_load_balancing,
        "scoring_func": args.moe_router_score_function,
        "norm_topk_prob": not args.moe_relu_routing
        and (args.moe_router_topk > 1 if is_sigmoid else not args.moe_router_pre_softmax),
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "router_expert_bias": args.moe_router_enable_expert_bias,
        "hash_routing": args.moe_baseline_router == "hash",
        "router_dtype": ROUTER_DTYPES[args.moe_router_dtype],
        "router_aux_loss_coef": coefficient if isinstance(coefficient, float) else 0.0,
        "max_experts_per_token": args.moe_relu_max_experts,
    }


def flags_of(config: RemoeConfig) -> list[str]:
    """Return Megatron's flags for a configuration from `folder.read_config`.

    Raises:
        ConversionError: Megatron has no such model.
    """
    flags = common_flags(config, config.max_position_embeddings)
    flags += ["--attention-dropout", str(config.attention_dropout), *_attention_flags(config)]
    return flags + (_expert_flags(config) if config.num_experts else [])


def common_flags(config: Any, seq_length: int) -> list[str]:
    """Return the flags that all models with RoPE, RMSNorm and SwiGLU share, ours and public ones.

    `seq_length` is in tokens, for training.
    """
    flags = f"""
        --num-layers {config.num_hidden_layers} --hidden-size {config.hidden_size}
        --ffn-hidden-size {config.intermediate_size} --num-attention-heads {config.num_attention_heads}
        --seq-length {seq_length} --max-position-embeddings {config.max_position_embeddings}
        --normalization RMSNorm --norm-epsilon {config.rms_norm_eps} --swiglu --disable-bias-linear
        --position-embedding-type rope --rotary-base {int(config.rope_parameters["rope_theta"])}
        --init-method-std {config.initializer_range} --hidden-dropout 0
    """.split()
    if not config.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    return flags + {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(config.dtype, [])


def _attention_flags(config: RemoeConfig) -> list[str]:
    if config.kv_lora_rank is not None:
        sizes = {flag(name): getattr(config, field) for field, name in LATENT.items()}
        words = [word for name, size in sizes.items() if size is not None for word in (name, str(size))]
        words += ["--kv-channels", str(config.hidden_size // config.num_attention_heads)]  # unused, but compared
        return ["--multi-latent-attention", "--qk-layernorm", "--rope-type", "rope", "--no-rope-fusion", *words]
    heads = ["--group-query-attention", "--num-query-groups", str(config.num_key_value_heads)]
    norms = {None: [], "head": ["--qk-layernorm"], "all_heads": ["--qk-layernorm", "--qk-layernorm-all-heads"]}
    return [*heads, "--kv-channels", str(config.head_dim), *norms[config.qk_norm]]


def _expert_flags(config: RemoeConfig) -> list[str]:
    flags = f"""
        --num-experts {config.num_experts} --moe-router-topk {config.num_experts_per_tok}
        --moe-ffn-hidden-size {config.moe_intermediate_size} --moe-token-dispatcher-type alltoall
    """.split()
    if config.mlp_only_layers:  # a list names the layers in checkpoints one by one, also where all have experts
        pattern = [int(layer not in config.mlp_only_layers) for layer in range(config.num_hidden_layers)]
        flags += ["--moe-layer-freq", str(pattern).replace(" ", "")]
    if config.shared_expert_intermediate_size:
        flags += ["--moe-shared-expert-intermediate-size", str(config.shared_expert_intermediate_size)]
        flags += ["--moe-shared-expert-gate"] * config.shared_expert_gate
    if config.router_dtype:
        flags += ["--moe-router-dtype", {"float32": "fp32", "float64": "fp64"}[config.router_dtype]]
    if not config.moe_relu_routing:
        return flags + _topk_flags(config)
    flags.append("--moe-relu-routing")
    flags += ["--no-moe-relu-l1-reg-load-balancing"] * (not config.moe_relu_load_balancing)
    if config.max_experts_per_token is not None:
        flags += ["--moe-relu-max-experts", str(config.max_experts_per_token)]
    if config.router_aux_loss_coef:
        flags += ["--moe-relu-l1-reg-coeff-init", repr(config.router_aux_loss_coef)]
    return flags


def _topk_flags(config: RemoeConfig) -> list[str]:
    if config.hash_routing:
        return "--moe-baseline-router hash --moe-router-load-balancing-type none --moe-aux-loss-coeff 0".split()
    flags = f"--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {config.router_aux_loss_coef}".split()
    if config.scoring_func == "sigmoid":
        if config.norm_topk_prob != (config.num_experts_per_tok > 1):
            raise ConversionError(
                "--load: with scoring_func sigmoid norm_topk_prob must be true where k > 1, else false.", "REMOE-E512"
            )
        flags += ["--moe-router-score-function", "sigmoid"]
    elif not config.norm_topk_prob:
        flags.append("--moe-router-pre-softmax")
    if config.router_expert_bias:
        flags.append("--moe-router-enable-expert-bias")
    if config.routed_scaling_factor != 1:
        flags += ["--moe-router-topk-scaling-factor", repr(config.routed_scaling_factor)]
    return flags


def vocabulary_flags(config: RemoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the flags for an embedding of the same size in Megatron's model."""
    rows = config.vocab_size
    if tokenizer is None:
        return f"--tokenizer-type NullTokenizer --vocab-size {rows} --make-vocab-size-divisible-by 1".split()
    least = max(1, rows - len(tokenizer) + 1)
    divisor = next(divisor for divisor in range(least, rows + 1) if rows % divisor == 0)
    return [
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer.name_or_path),
        *("--make-vocab-size-divisible-by", str(divisor)),
    ]


def parse_flags(flags: Sequence[str], config: Any) -> argparse.Namespace:
    """Return Megatron's arguments for the flags of a model with this configuration, as a training would save them.

    Raises:
        ConversionError: this version has no such flag.
    """
    args, unknown = _parser().parse_known_args(flags)
    if unknown:
        raise ConversionError(f"this model needs {unknown[0]}, which this version does not have.", "REMOE-E512")
    args.padded_vocab_size = config.vocab_size
    args.params_dtype = config.dtype or torch.float32
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = args.iteration = 0
    return args


def _parser() -> argparse.ArgumentParser:
    return add_remoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
