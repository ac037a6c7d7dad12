"""Copy weights between models of Megatron and of transformers."""

import re
from collections.abc import Iterator, Mapping

import torch

from megatron.core.models.gpt import GPTModel
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from megatron.remoe.hf.routing_remoe import RemoeRouter
from megatron.remoe.routing.gate_scale import GateScale, initial_scale

from ..hybrid import FINAL_NORM
from ..megatron_model import EXPERT

Tensors = Mapping[str, torch.Tensor]

OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    f"{FINAL_NORM['gpt']}weight": "model.norm.weight",
    f"{FINAL_NORM['hybrid']}weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
LAYER = re.compile(r"decoder\.layers\.(?P<number>\d+)\.(?P<rest>.+)")
# In a layer: Megatron's name → name in transformers. Experts are stacked: [experts, out, in], gate above up.
RENAMED_WEIGHTS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.gate_scale.scale": "mlp.gate.gate_scale",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
STACKED = {"linear_fc1.weight": "mlp.experts.gate_up_proj", "linear_fc2.weight": "mlp.experts.down_proj"}
HALVES = {"mlp.linear_fc1.weight": "mlp.", "mlp.shared_experts.linear_fc1.weight": "mlp.shared_expert."}
QKV = "self_attention.linear_qkv.weight"


@torch.no_grad()
def fill_megatron(model: GPTModel, source: RemoeForCausalLM) -> None:
    """Copy the weights of a model for transformers into Megatron's model.

    λ's exponent stays 0: the flags' λ₀ is the model's λ.
    """
    for tensor, other in match_parts(model.state_dict(), source.state_dict(), source.config):
        tensor.copy_(other)
    for module in model.modules():
        if isinstance(module, GateScale):  # the folder has s · c
            module.scale.div_(module.initial)


@torch.no_grad()
def convert_model(model: GPTModel, config: RemoeConfig) -> RemoeForCausalLM:
    """Return Megatron's model as one for transformers, in the dtype of the configuration, for evaluation."""
    target = RemoeForCausalLM._from_config(config, dtype=config.dtype or torch.float32).eval()
    for tensor, other in match_parts(model.state_dict(), target.state_dict(), config):
        other.copy_(tensor)
    for module in target.modules():
        if isinstance(module, RemoeRouter) and module.gate_scale is not None:
            module.gate_scale.mul_(initial_scale(config.num_experts, config.mean_experts_per_token))
    return target


def match_parts(
    megatron: Mapping[str, object], other: Tensors, config: RemoeConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each weight as two views of the same shape: one of Megatron's tensor, one of transformers'.

    Args:
        megatron: state of a GPTModel, or of a HybridModel whose layers alternate attention and MLP.
        other: state of the model for transformers.
        config: of the model.
    """
    layers_per_block = 2 if f"{FINAL_NORM['hybrid']}weight" in megatron else 1
    for name, tensor in megatron.items():
        # Leave out layers of multi-token prediction, and integers: λ's exponent and whether a layer is guarded.
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or name.startswith("mtp."):
            continue
        if (layer := LAYER.fullmatch(name)) is None:
            yield tensor, other[OUTER[name]]
            continue
        rest, prefix = layer["rest"], f"model.layers.{int(layer['number']) // layers_per_block}."
        if expert := EXPERT.fullmatch(name):
            yield tensor, other[prefix + STACKED[expert["weight"]]][int(expert["expert"])]
        elif rest == QKV:
            yield from _attention_parts(tensor, prefix, other, config)
        elif rest in HALVES:
            for part, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
                yield half, other[f"{prefix}{HALVES[rest]}{part}_proj.weight"]
        else:
            yield tensor, other[prefix + RENAMED_WEIGHTS[rest]]


def _attention_parts(
    tensor: torch.Tensor, prefix: str, other: Tensors, config: RemoeConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the weights of queries, keys and values, which Megatron stores together for each group of heads."""
    groups, size = config.num_key_value_heads, config.head_dim
    assert groups is not None and size is not None
    heads = config.num_attention_heads // groups * size
    parts = tensor.view(groups, heads + 2 * size, -1).split([heads, size, size], dim=1)
    for letter, part in zip("qkv", parts, strict=True):
        yield part, other[f"{prefix}self_attn.{letter}_proj.weight"].view(part.shape)
