"""Describe public top-k MoEs (OLMoE, Qwen3-MoE, Mixtral, DeepSeek-V2) with this project's configuration.

Each family has a function that maps its configuration to the fields in which it differs from the other families.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from megatron.remoe.hf import RemoeConfig

from ...console.errors import ConversionError

SHARED_FIELDS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
max_position_embeddings rms_norm_eps rope_parameters initializer_range tie_word_embeddings num_experts
num_experts_per_tok""".split()
LATENT = "kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim routed_scaling_factor".split()
# Field → the only value that Megatron can express.
REQUIRED_VALUES: dict[str, Any] = {
    **{"hidden_act": "silu", "clip_qkv": None, "topk_method": "greedy"},
    **{"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
}


def describe_public(config: Any) -> RemoeConfig:
    """Return the configuration of a public model as one of this project, for top-k routing.

    Raises:
        ConversionError: Megatron cannot express the model.
    """
    for name, value in REQUIRED_VALUES.items():
        if getattr(config, name, value) != value:
            raise _inexpressible(config, name)
    rope, is_latent = config.rope_parameters, config.model_type == "deepseek_v2"
    if rope["rope_theta"] != int(rope["rope_theta"]) or (rope["rope_type"] != "default" and not is_latent):
        raise _inexpressible(config, "rope_parameters")
    window = getattr(config, "sliding_window", None) if config.model_type == "mixtral" else None
    if window is not None and window < config.max_position_embeddings:
        raise _inexpressible(config, "sliding_window")
    if config.num_attention_heads % config.num_key_value_heads:
        raise _inexpressible(config, "num_key_value_heads")
    if is_latent and config.rms_norm_eps != 1e-6:
        raise _inexpressible(config, "rms_norm_eps")  # its latent norms always use 1e-6; Megatron has one for all
    named = {"num_experts": "n_routed_experts"} if is_latent else {}  # transformers before 5.16 does not map it
    fields = {name: getattr(config, named.get(name, name)) for name in SHARED_FIELDS}
    fields["moe_intermediate_size"] = getattr(config, "moe_intermediate_size", config.intermediate_size)
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    coefficient = getattr(config, "router_aux_loss_coef", 0.001)
    return RemoeConfig(
        **(fields | FAMILIES[config.model_type](config)),
        moe_relu_routing=False,
        router_aux_loss_coef=coefficient,
        dtype=config.dtype,
        bos_token_id=None,
        eos_token_id=None,
    )


def _inexpressible(config: PreTrainedConfig, name: str) -> ConversionError:
    value = getattr(config, name)
    return ConversionError(
        f"--from-hf: Megatron's model of the kind {config.model_type} cannot have {name} {value!r}.", "REMOE-E512"
    )


def _qwen3(config: Any) -> dict[str, Any]:
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
    layers = range(config.num_hidden_layers)
    return {
        "norm_topk_prob": config.norm_topk_prob,
        "qk_norm": "head",
        "mlp_only_layers": [layer for layer in layers if layer in dense or (layer + 1) % step],
    }


def _deepseek(config: Any) -> dict[str, Any]:
    return {
        **{name: getattr(config, name) for name in LATENT},
        "shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
        "mlp_only_layers": [*range(config.first_k_dense_replace)],
        "router_dtype": "float32",
    }


FAMILIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "olmoe": lambda config: {"norm_topk_prob": config.norm_topk_prob, "qk_norm": "all_heads"},
    "qwen3_moe": _qwen3,
    "mixtral": lambda config: {"norm_topk_prob": True},
    "deepseek_v2": _deepseek,
}
