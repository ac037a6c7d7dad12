"""Import a top-k MoE from a Hugging Face folder: OLMoE, Qwen3-MoE, Mixtral or DeepSeek-V2.

A family is a function from the folder's configuration to Megatron's flags. Each weight of Megatron's model is looked up
in the folder; one that is missing there, or left over, is an error.
"""

import argparse
import gc
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from megatron.core.models.gpt import GPTModel

from ..common.checkpoints import check_output, save
from ..common.display import Display
from ..common.errors import ConversionError
from ..common.hf.folder import headers, read_object, weight_files
from ..common.hf.settings import parse_flags, vocabulary_flags
from ..common.hf.tokenizer import read_tokenizer
from ..common.megatron_model import EXPERT, build
from ..common.one_process import one_process

BOUND = 1e-4  # of the logits' difference, as a share of the largest
TOKENS = 512
SEQUENCE = 4096  # of the printed command, if the model has that many positions
# Batch size, steps and learning rate are for the user to choose.
PROGRAM = "python pretrain_gpt.py --micro-batch-size 1 --global-batch-size 64 --train-iters 1000 --lr 1e-5"
PROGRAM += " --eval-interval 1000 --data-path DATA"
LAYER = re.compile(r"decoder\.layers\.(?P<number>\d+)\.(?P<rest>.+)")
OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
# In a layer: Megatron's name → the folder's. Several are put one below the other.
INNER = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "self_attention.linear_q_proj.weight": ["self_attn.q_proj.weight"],
    "self_attention.linear_q_down_proj.weight": ["self_attn.q_a_proj.weight"],
    "self_attention.linear_q_up_proj.weight": ["self_attn.q_b_proj.weight"],
    "self_attention.linear_kv_down_proj.weight": ["self_attn.kv_a_proj_with_mqa.weight"],
    "self_attention.linear_kv_up_proj.weight": ["self_attn.kv_b_proj.weight"],
    "self_attention.kv_layernorm.weight": ["self_attn.kv_a_layernorm.weight"],
    "self_attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "self_attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.router.weight": ["mlp.gate.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
    "mlp.shared_experts.linear_fc1.weight": [
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ],
    "mlp.shared_experts.linear_fc2.weight": ["mlp.shared_experts.down_proj.weight"],
    "self_attention.linear_qkv.weight": [
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ],
}
QKV = "self_attention.linear_qkv.weight"
# Where a family's names differ.
RENAMED = {
    "mixtral": {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "deepseek_v2": {"self_attn.q_norm": "self_attn.q_a_layernorm"},
}
# Field → the only value that Megatron can express, where it is not the family's.
ONLY: dict[str, Any] = {
    **{"hidden_act": "silu", "clip_qkv": None, "quantization_config": None, "topk_method": "greedy"},
    **{"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
}


def convert_hf(options: argparse.Namespace, display: Display) -> None:
    """Write the folder `options.from_hf` as a checkpoint to `options.save`, if the logits of both models agree.

    Raises:
        ConversionError: it holds no such model, or one that Megatron cannot express; it is damaged; the logits differ.
    """
    check_output(options.save)
    folder: Path = options.from_hf
    config = read_config(folder)
    flags = [*_common_flags(config), *FAMILIES[config.model_type](config), *_vocabulary_flags(folder, config)]
    args = parse_flags(flags, config.vocab_size, config.dtype)
    display.say(f"{config.model_type}: {args.num_layers} layers of hidden size {args.hidden_size}, {args.num_experts} "
                f"experts, {args.moe_router_topk} per token")  # fmt: skip
    with nullcontext() if torch.distributed.is_initialized() else one_process(options.seed):
        model = build(args)
        with open_weights(folder) as weights:
            fill(model, config, weights)
        length = min(TOKENS, config.max_position_embeddings)
        tokens = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(options.seed))
        with torch.no_grad():
            logits = model(tokens, torch.arange(length)[None], None)
        engine = options.transformer_impl or "local"
        args.transformer_impl = engine
        difference = float((_logits(folder, tokens) - logits).abs().max() / logits.abs().max())
        result = f"largest difference of logits {difference:.1e} of the largest, on {length} random tokens"
        if not difference <= BOUND:
            raise ConversionError(f"{result}, above {BOUND:.0e}: nothing was written.", "REMOE-E514")
        display.say(result)
        save(model.to(args.params_dtype), args, options.save, engine == "transformer_engine")
    display.say(
        f"wrote {options.save}. Train on from it:\n"
        f"{PROGRAM} {shlex.join(['--pretrained-checkpoint', str(options.save), *flags])}\n"
        f"or make a ReMoE with half the experts per token of it: python tools/convert_checkpoint --load {options.save} "
        f"--save REMOE --moe-router-topk {max(1, args.moe_router_topk // 2)} --data-path DATA"
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a family in `FAMILIES`; no code of the folder is run.

    Raises:
        ConversionError: config.json cannot be read, is of another kind of model, or asks for what Megatron lacks.
    """
    path = folder / "config.json"
    fields = read_object(path)
    family = fields.get("model_type")
    if family not in FAMILIES:
        other = " Use tools/export_hf --reverse." * (family == "remoe")
        raise ConversionError(f"{path}: model_type is {family!r:.40}, and must be one of {sorted(FAMILIES)}.{other}")
    if (folder / "adapter_config.json").exists():
        raise ConversionError(f"{folder}: holds an adapter. Merge it into the model and save that.")
    try:
        config = CONFIG_MAPPING[family].from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ConversionError(f"{path}: {str(error).rpartition('Error: ')[2] or error}") from error
    for name, value in ONLY.items():
        if getattr(config, name, value) != value:
            raise _inexpressible(config, name, getattr(config, name))
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


def _common_flags(config: Any) -> list[str]:
    theta, kind = config.rope_parameters["rope_theta"], config.rope_parameters["rope_type"]
    if theta != int(theta):
        raise _inexpressible(config, "rope_theta", theta)
    if kind != "default" and config.model_type != "deepseek_v2":
        raise _inexpressible(config, "rope_type", kind)
    flags = f"""
        --num-layers {config.num_hidden_layers} --hidden-size {config.hidden_size}
        --ffn-hidden-size {config.intermediate_size} --num-attention-heads {config.num_attention_heads}
        --seq-length {min(SEQUENCE, config.max_position_embeddings)}
        --max-position-embeddings {config.max_position_embeddings} --position-embedding-type rope
        --rotary-base {int(theta)} --normalization RMSNorm --norm-epsilon {config.rms_norm_eps} --swiglu
        --disable-bias-linear --init-method-std {config.initializer_range} --attention-dropout 0 --hidden-dropout 0
        --num-experts {config.num_experts} --moe-router-topk {config.num_experts_per_tok}
        --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss
        --moe-aux-loss-coeff {getattr(config, "router_aux_loss_coef", 0.001)}
    """.split()
    if not config.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    return flags + {torch.bfloat16: ["--bf16"], torch.float16: ["--fp16"]}.get(config.dtype, [])


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


def _vocabulary_flags(folder: Path, config: Any) -> list[str]:
    if not (folder / "tokenizer_config.json").is_file():
        return vocabulary_flags(config, None, 0)
    return vocabulary_flags(config, folder, len(read_tokenizer(folder, f"--from-hf {folder}", config)))


class Weights:
    """The tensors of a folder by name, read one at a time.

    Attributes:
        unused: names that nobody has asked for yet.
    """

    def __init__(self, folder: Path, files: dict[str, Any]) -> None:
        self._folder, self._files = folder, files
        self.unused = {name for name in files if not name.endswith("rotary_emb.inv_freq")}

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor in its own dtype.

        Raises:
            ConversionError: it is missing, or holds NaN or infinity.
        """
        if name not in self._files:
            raise ConversionError(f"{self._folder}: has no {name}, which its config.json calls for.")
        self.unused.discard(name)
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if not tensor.isfinite().all():
            raise ConversionError(f"{self._folder}: {name} holds values that are not finite.")
        return tensor


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Open a folder's .safetensors files.

    Raises:
        ConversionError: one is missing, damaged or outside the folder.
    """
    files: dict[str, Any] = {}
    for path in weight_files(folder):
        names = [name for name, _, _ in headers(path)]
        files |= dict.fromkeys(names, safe_open(path, framework="pt"))
    yield Weights(folder, files)


@torch.no_grad()
def fill(model: GPTModel, config: Any, weights: Weights) -> None:
    """Copy a folder's weights into Megatron's model.

    Raises:
        ConversionError: a tensor is missing, unexpected, not finite, or has another shape.
    """
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor):
            continue
        names = _names(name, config)
        parts = [weights.get(one) for one in names]
        if name.endswith(QKV):
            heads = [part.view(config.num_key_value_heads, -1, config.hidden_size) for part in parts]
            parts = [torch.cat(heads, dim=1).flatten(0, 1)]
        found = torch.cat(parts)
        if found.shape != tensor.shape:
            raise ConversionError(
                f"--from-hf: {', '.join(names)} should have the shape {list(tensor.shape)} together, and has "
                f"{list(found.shape)}."
            )
        tensor.copy_(found)
    if weights.unused:
        first = min(weights.unused)
        raise ConversionError(f"--from-hf: {len(weights.unused)} tensors, such as {first}, do not belong to the model.")


def _names(name: str, config: Any) -> list[str]:
    """Return the folder's names of the tensors that one of Megatron's is made of."""
    if (layer := LAYER.fullmatch(name)) is None:
        return [OUTER[name]]
    rest, prefix = layer["rest"], ""
    if expert := EXPERT.fullmatch(name):
        rest, prefix = f"mlp.{expert['weight']}", f"experts.{expert['expert']}."
    found = [other.replace("mlp.", f"mlp.{prefix}") for other in INNER[rest]]
    for old, new in RENAMED.get(config.model_type, {}).items():
        found = [other.replace(old, new) for other in found]
    return [f"model.layers.{layer['number']}.{other}" for other in found]


@torch.no_grad()
def _logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' own model, which is freed again."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    del model
    gc.collect()
    return logits
