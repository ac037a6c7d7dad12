"""Convert weights between the names of Megatron and of transformers, one layer at a time."""

from collections.abc import Iterator

import torch

from megatron.core.models.gpt import GPTModel
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ..checkpoints import Checkpoint, read_parts
from ..errors import ConversionError
from ..hybrid import FINAL_NORM, hybrid_layer
from ..megatron_model import EXPERT
from .tensors import Tensors, check_tensors, shapes_of

OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
BIAS = "mlp.router.expert_bias"  # in float32, as in training
# In a layer: Megatron's name → name in transformers. Experts are stacked: [experts, out, in], gate above up.
SAME = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    BIAS: "mlp.gate.e_score_correction_bias",
    "mlp.experts.linear_fc1.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.linear_fc2.weight": "mlp.experts.down_proj",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
Q_NORM = "self_attention.q_layernorm.weight"  # norm of the queries, or of their latents
HALVES = {"mlp.linear_fc1.weight": "mlp.", "mlp.shared_experts.linear_fc1.weight": "mlp.shared_expert."}
QKV = "self_attention.linear_qkv.weight"
# Different keys in checkpoints: of plain PyTorch layers, then of Transformer Engine's.
KEYS = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
    "self_attention.kv_layernorm.weight": ("self_attention.linear_kv_up_proj.layer_norm_weight",),
    Q_NORM: (Q_NORM, "self_attention.linear_q_up_proj.layer_norm_weight"),
    "mlp.experts.linear_fc1.weight": ("mlp.experts.experts.linear_fc1.weight",),
    "mlp.experts.linear_fc2.weight": ("mlp.experts.experts.linear_fc2.weight",),
}


def _same(config: RemoeConfig) -> dict[str, str]:
    return SAME | {Q_NORM: f"self_attn.{'q_norm' if config.kv_lora_rank is None else 'q_a_layernorm'}.weight"}


def to_transformers(layer: Tensors, config: RemoeConfig) -> Tensors:
    """Convert a layer's weights, by Megatron's names without "decoder.layers.N.", to the names of transformers."""
    found = {}
    for name, tensor in layer.items():
        if name == QKV:
            assert config.head_dim is not None and config.num_key_value_heads is not None
            size = config.head_dim
            heads = config.num_attention_heads // config.num_key_value_heads * size
            groups = tensor.view(config.num_key_value_heads, heads + 2 * size, -1)
            for letter, part in zip("qkv", groups.split([heads, size, size], dim=1), strict=True):
                found[f"self_attn.{letter}_proj.weight"] = part.reshape(-1, tensor.shape[-1])
        elif name in HALVES:
            gate, up = tensor.chunk(2)
            found |= {f"{HALVES[name]}gate_proj.weight": gate, f"{HALVES[name]}up_proj.weight": up}
        else:
            found[_same(config)[name]] = tensor
    return found


def to_megatron(layer: Tensors, config: RemoeConfig) -> Tensors:
    """Convert a layer's weights to Megatron's names; the inverse of `to_transformers`."""
    found = {name: layer[other] for name, other in _same(config).items() if other in layer}
    for name, prefix in HALVES.items():
        if f"{prefix}gate_proj.weight" in layer:
            found[name] = torch.cat([layer[f"{prefix}gate_proj.weight"], layer[f"{prefix}up_proj.weight"]])
    if config.kv_lora_rank is not None:
        return found
    del found["self_attention.linear_q_proj.weight"]  # a part of the one below
    parts = [layer[f"self_attn.{letter}_proj.weight"] for letter in "qkv"]
    hidden = parts[0].shape[-1]
    assert config.num_key_value_heads is not None
    grouped = [part.view(config.num_key_value_heads, -1, hidden) for part in parts]
    return found | {QKV: torch.cat(grouped, dim=1).view(-1, hidden)}


def _attention(config: RemoeConfig) -> list[str]:
    """Return the parts of a layer's attention that have weights, but for its output."""
    if config.kv_lora_rank is None:
        return ["linear_qkv", *["q_layernorm", "k_layernorm"] * (config.qk_norm is not None)]
    queries = (
        ["linear_q_proj"] if config.q_lora_rank is None else ["linear_q_down_proj", "q_layernorm", "linear_q_up_proj"]
    )
    return [*queries, "linear_kv_down_proj", "kv_layernorm", "linear_kv_up_proj"]


def _names(config: RemoeConfig, layer: int) -> list[str]:
    names = ["input_layernorm.weight", "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight"]
    names += [f"self_attention.{part}.weight" for part in _attention(config)]
    if not config.num_experts or layer in config.mlp_only_layers:
        return [*names, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    groups = ["experts"] + ["shared_experts"] * bool(config.shared_expert_intermediate_size)
    gate = ["mlp.shared_experts.gate_weight"] * config.shared_expert_gate
    router = [] if config.hash_routing else ["mlp.router.weight"]
    router += [BIAS] if config.router_expert_bias else []
    return [*names, *gate, *router] + [f"mlp.{group}.linear_fc{number}.weight" for group in groups for number in (1, 2)]


def read(checkpoint: Checkpoint, config: RemoeConfig) -> Iterator[Tensors]:
    """Yield the weights under the names of transformers: first those outside layers, then layer by layer.

    They have the configuration's dtype.

    Raises:
        ConversionError: one is missing, has another shape, cannot be read, or holds NaN or infinity.
    """
    shapes = shapes_of(config)
    outer = {OUTER[name]: tensor for name, tensor in read_outer(checkpoint, config).items()}
    yield check_tensors(checkpoint.folder, shapes, outer)
    for number in range(config.num_hidden_layers):
        layer = to_transformers(read_layer(checkpoint, config, number), config)
        named = {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
        yield check_tensors(checkpoint.folder, shapes, named)


def read_outer(checkpoint: Checkpoint, config: RemoeConfig) -> Tensors:
    """Return the weights outside layers, under Megatron's names."""
    names = [name for name in OUTER if not (config.tie_word_embeddings and name == "output_layer.weight")]
    of_hybrid = {name: name.replace(FINAL_NORM["gpt"], FINAL_NORM["hybrid"]) for name in names}
    return _load(checkpoint, of_hybrid if _is_hybrid(checkpoint) else {name: name for name in names}, config)


def read_layer(checkpoint: Checkpoint, config: RemoeConfig, number: int) -> Tensors:
    """Return the weights of a layer, counted from 0, under Megatron's names in `SAME`, `HALVES` and `QKV`."""
    return _load(checkpoint, {name: _key(checkpoint, name, number) for name in _names(config, number)}, config, number)


def exponents(checkpoint: Checkpoint, config: RemoeConfig) -> list[int]:
    """Return λ's exponent in each layer with a ReLU router."""
    keys = {key: key for key in checkpoint.shapes if key.endswith(".mlp.router.l1_exponent")}
    loaded = _load(checkpoint, keys, config, dtype=torch.int64)
    return [number for tensor in loaded.values() for number in tensor.flatten().tolist()]


def _is_hybrid(checkpoint: Checkpoint) -> bool:
    return bool(getattr(checkpoint.args, "hybrid_layer_pattern", None))


def _key(checkpoint: Checkpoint, name: str, layer: int) -> str:
    # Equal layers are stored as one tensor; if layers differ, each key has its layer's number.
    numbered = any(key.startswith("decoder.layers.0.") for key in checkpoint.shapes)
    number = hybrid_layer(layer, name) if _is_hybrid(checkpoint) else layer
    keys = [
        f"decoder.layers.{number}.{key}" if numbered else f"decoder.layers.{key}" for key in KEYS.get(name, (name,))
    ]
    return next((key for key in keys if key in checkpoint.shapes), keys[0])


def _load(
    checkpoint: Checkpoint,
    keys: dict[str, str],
    config: RemoeConfig,
    layer: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensors:
    """Return name → tensor for the stored keys in `keys`; only the layer's slice of a stacked tensor."""
    assert not isinstance(config.dtype, str)
    found, parts = {}, {}
    for name, key in keys.items():
        if key not in checkpoint.shapes:
            raise ConversionError(
                f"{checkpoint.folder}: has no {key}, which its arguments call for. Only models that pretrain_gpt.py "
                "trains can be exported."
            )
        shape = checkpoint.shapes[key]
        stacked = layer is not None and not key.split(".")[2].isdecimal()
        wanted = torch.float32 if name == BIAS else dtype or config.dtype
        data = torch.empty((1, *shape[1:]) if stacked else shape, dtype=wanted)
        parts[key] = (data, (layer or 0) if stacked else None)
        found[name] = data[0] if stacked else data
    read_parts(checkpoint, parts)
    return found


@torch.no_grad()
def fill(model: GPTModel, outer: Tensors, layers: list[Tensors]) -> None:
    """Copy weights from `read_outer` and `read_layer` into Megatron's model."""
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor) or tensor.dtype == torch.int64:
            continue  # λ's exponent is 0: the flags' λ₀ is the model's λ
        if name in outer:
            tensor.copy_(outer[name])
            continue
        number, inner = name.removeprefix("decoder.layers.").split(".", 1)
        if expert := EXPERT.fullmatch(name):
            tensor.copy_(layers[int(number)][f"mlp.experts.{expert['weight']}"][int(expert["expert"])])
        else:
            tensor.copy_(layers[int(number)][inner])


def megatron_weights(model: RemoeForCausalLM) -> tuple[Tensors, list[Tensors]]:
    """Return the weights of a model for transformers as arguments of `fill`."""
    state, layers = model.state_dict(), []
    for number in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        layer = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        layers.append(to_megatron(layer, model.config))
    return {name: state[other] for name, other in OUTER.items()}, layers
