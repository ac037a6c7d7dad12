"""Convert weights between the names of Megatron and of transformers, one layer at a time."""

from collections.abc import Iterator

import torch

from megatron.core.models.gpt import GPTModel
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ...console.errors import ConversionError
from ..checkpoints import Checkpoint, read_parts
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


def _layer(tensors: Tensors, number: int) -> Tensors:
    """Return the tensors of one layer of a model for transformers; their names lose "model.layers.N."."""
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read(checkpoint: Checkpoint, config: RemoeConfig) -> Iterator[Tensors]:
    """Yield the weights under the names of transformers: first those outside layers, then layer by layer.

    They have the configuration's dtype; biases of experts are in float32.

    Raises:
        ConversionError: one is missing, has another shape, cannot be read, or holds NaN or infinity.
    """
    shapes = shapes_of(config)
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    final_norm = FINAL_NORM["hybrid" if _is_hybrid(checkpoint) else "gpt"]
    keys = {other: name.replace(FINAL_NORM["gpt"], final_norm) for name, other in OUTER.items() if other in shapes}
    yield check_tensors(checkpoint.folder, shapes, _load(checkpoint, keys, config))
    for number in range(config.num_hidden_layers):
        keys = {name: _key(checkpoint, name, number) for name in to_megatron(_layer(empty, number), config)}
        layer = to_transformers(_load(checkpoint, keys, config, number), config)
        named = {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
        yield check_tensors(checkpoint.folder, shapes, named)


def exponents(checkpoint: Checkpoint) -> list[int]:
    """Return λ's exponent in each layer with a ReLU router."""
    keys = [key for key in checkpoint.shapes if key.endswith(".mlp.router.l1_exponent")]
    found = {key: torch.empty(checkpoint.shapes[key], dtype=torch.int64) for key in keys}
    read_parts(checkpoint.folder, checkpoint.index, {key: (tensor, None) for key, tensor in found.items()})
    return [number for tensor in found.values() for number in tensor.flatten().tolist()]


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


def _load(checkpoint: Checkpoint, keys: dict[str, str], config: RemoeConfig, layer: int | None = None) -> Tensors:
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
        wanted = torch.float32 if name == BIAS else config.dtype
        data = torch.empty((1, *shape[1:]) if stacked else shape, dtype=wanted)
        parts[key] = (data, (layer or 0) if stacked else None)
        found[name] = data[0] if stacked else data
    read_parts(checkpoint.folder, checkpoint.index, parts)
    return found


@torch.no_grad()
def fill(model: GPTModel, source: RemoeForCausalLM) -> None:
    """Copy the weights of a model for transformers into Megatron's model."""
    state = source.state_dict()
    layers = [to_megatron(_layer(state, number), source.config) for number in range(source.config.num_hidden_layers)]
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor) or tensor.dtype == torch.int64:
            continue  # λ's exponent is 0: the flags' λ₀ is the model's λ
        if name in OUTER:
            tensor.copy_(state[OUTER[name]])
            continue
        number, inner = name.removeprefix("decoder.layers.").split(".", 1)
        if expert := EXPERT.fullmatch(name):
            tensor.copy_(layers[int(number)][f"mlp.experts.{expert['weight']}"][int(expert["expert"])])
        else:
            tensor.copy_(layers[int(number)][inner])
