"""Read the configuration of a public top-k MoE, and express it in Megatron's flags.

A family is a function from the folder's configuration to the flags in which it differs from the others.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...console.errors import ConversionError
from ..hf.folder import read_object
from ..hf.settings import common_flags, vocabulary_flags
from ..hf.tokenizer import read_tokenizer

SEQUENCE = 4096  # for training, if the model has that many positions
# Field → the only value that Megatron can express, where it is not the family's.
ONLY: dict[str, Any] = {
    **{"hidden_act": "silu", "clip_qkv": None, "quantization_config": None, "topk_method": "greedy"},
    **{"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
}


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a family in `FAMILIES`; no code of the folder is run.

    Raises:
        ConversionError: config.json cannot be read, is of another kind of model, or needs what Megatron does not have.
    """
    path = folder / "config.json"
    fields = read_object(path)
    family = str(fields.get("model_type"))
    if family not in FAMILIES:
        other = " Use remoe export --reverse." * (family == "remoe")
        raise ConversionError(f"{path}: model_type is {family!r:.40}, and must be one of {sorted(FAMILIES)}.{other}")
    if (folder / "adapter_config.json").exists():
        raise ConversionError(f"{folder}: holds an adapter. Merge it into the model and save that.")
    try:
        config = CONFIG_MAPPING[family].from_dict(fields)
        theta, kind = config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{path}: {str(error).rpartition('Error: ')[2] or error}") from error
    for name, value in ONLY.items():
        if getattr(config, name, value) != value:
            raise _inexpressible(config, name, getattr(config, name))
    if theta != int(theta):
        raise _inexpressible(config, "rope_theta", theta)
    if kind != "default" and family != "deepseek_v2":
        raise _inexpressible(config, "rope_type", kind)
    window = getattr(config, "sliding_window", None) if family == "mixtral" else None
    if window is not None and window < config.max_position_embeddings:
        raise _inexpressible(config, "sliding_window", window)
    if config.num_attention_heads % config.num_key_value_heads:
        raise _inexpressible(config, "num_key_value_heads", config.num_key_value_heads)
    return config


def _inexpressible(config: PreTrainedConfig, name: str, value: Any) -> ConversionError:
    return ConversionError(
        f"--from-hf: Megatron's model of the kind {config.model_type} cannot have {name} {value!r}.", "REMOE-E512"
    )


def flags_of(folder: Path, config: Any) -> list[str]:
    """Return Megatron's flags for the model in a folder, its tokenizer included.

    Raises:
        ConversionError: Megatron has no such model, or the tokenizer cannot be read.
    """
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(folder, f"--from-hf {folder}", config) if has_tokenizer else None
    flags = f"""
        --attention-dropout 0 --num-experts {config.num_experts} --moe-router-topk {config.num_experts_per_tok}
        --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss
        --moe-aux-loss-coeff {getattr(config, "router_aux_loss_coef", 0.001)}
    """.split()
    common = common_flags(config, min(SEQUENCE, config.max_position_embeddings))
    return [*common, *flags, *FAMILIES[config.model_type](config), *vocabulary_flags(config, tokenizer)]


def _grouped_attention(config: Any) -> list[str]:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"--group-query-attention --num-query-groups {config.num_key_value_heads} --kv-channels {size}".split()


def _mixtral(config: Any) -> list[str]:
    return [*_grouped_attention(config), "--moe-ffn-hidden-size", str(config.intermediate_size)]


def _olmoe(config: Any) -> list[str]:
    # The norms are over all heads together; Megatron's own are over each head.
    flags = [*_mixtral(config), "--qk-layernorm", "--qk-layernorm-all-heads"]
    return flags if config.norm_topk_prob else [*flags, "--moe-router-pre-softmax"]


def _qwen3(config: Any) -> list[str]:
    flags = [*_grouped_attention(config), "--qk-layernorm", "--moe-ffn-hidden-size", str(config.moe_intermediate_size)]
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
    pattern = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(config.num_hidden_layers)]
    if not all(pattern):
        flags += ["--moe-layer-freq", str(pattern).replace(" ", "")]
    return flags if config.norm_topk_prob else [*flags, "--moe-router-pre-softmax"]


def _deepseek(config: Any) -> list[str]:
    if config.rms_norm_eps != 1e-6:  # its norms of latents have this one, and Megatron has one for all norms
        raise _inexpressible(config, "rms_norm_eps", config.rms_norm_eps)
    pattern = [int(layer >= config.first_k_dense_replace) for layer in range(config.num_hidden_layers)]
    flags = f"""
        --multi-latent-attention --qk-layernorm --kv-lora-rank {config.kv_lora_rank}
        --kv-channels {config.hidden_size // config.num_attention_heads}
        --qk-head-dim {config.qk_nope_head_dim} --qk-pos-emb-head-dim {config.qk_rope_head_dim}
        --v-head-dim {config.v_head_dim} --moe-ffn-hidden-size {config.moe_intermediate_size}
        --moe-shared-expert-intermediate-size {config.n_shared_experts * config.moe_intermediate_size}
        --moe-layer-freq {str(pattern).replace(" ", "")} --moe-router-pre-softmax --moe-router-dtype fp32
    """.split()
    if config.q_lora_rank is not None:
        flags += ["--q-lora-rank", str(config.q_lora_rank)]
    if config.routed_scaling_factor != 1:
        flags += ["--moe-router-topk-scaling-factor", str(config.routed_scaling_factor)]
    return flags + _latent_rope(config, dict(config.rope_parameters))


def _latent_rope(config: Any, rope: dict[str, Any]) -> list[str]:
    if rope["rope_type"] == "default":
        return ["--rope-type", "rope"]
    fixed = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
    for name, value in fixed.items():  # Megatron has no flags for them
        if rope.get(name, value) != value:
            raise _inexpressible(config, name, rope[name])
    scale, scale_of_all = rope.get("mscale") or 1.0, rope.get("mscale_all_dim") or 0.0
    return f"""
        --rope-type yarn --rotary-scaling-factor {rope["factor"]} --mscale {scale} --mscale-all-dim {scale_of_all}
    """.split()


FAMILIES: dict[str, Callable[[Any], list[str]]] = {
    "olmoe": _olmoe,
    "qwen3_moe": _qwen3,
    "mixtral": _mixtral,
    "deepseek_v2": _deepseek,
}
