"""Make small models of each kind for transformers."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from megatron.core.models.gpt import GPTModel
from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from tools.models.hf.settings import make_flags, parse_flags
from tools.models.hf.weights import fill_megatron
from tools.models.megatron_model import build

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": None, "dtype": "float32",
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
RELU = EXPERTS | {"router_aux_loss_coef": 0.05}
SIGMOID = EXPERTS | {"moe_relu_routing": False, "scoring_func": "sigmoid", "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"tie_word_embeddings": True},
    "relu": RELU,
    "relu, k = 1": RELU | {"num_experts_per_tok": 1},
    "relu, shared, not balanced": RELU
    | {"shared_expert_intermediate_size": 12, "mlp_only_layers": [0], "moe_relu_load_balancing": False},
    "relu, normalized": RELU
    | {"moe_relu_normalize": True, "max_experts_per_token": 4, "target_experts_per_token": 2}
    | {"num_experts_per_tok": 4, "mlp_only_layers": [0]},
    "relu, norms, shared gate": RELU
    | {"qk_norm": "head", "shared_expert_intermediate_size": 12, "shared_expert_gate": True, "mlp_only_layers": [0]},
    "relu, shared": RELU | {"shared_expert_intermediate_size": 12, "mlp_only_layers": [0], "router_dtype": "float64"},
    "top-k": EXPERTS | {"moe_relu_routing": False, "num_experts_per_tok": 1},
    "top-k, normed": EXPERTS | {"moe_relu_routing": False, "norm_topk_prob": True},
    "top-k, scaled": EXPERTS | {"moe_relu_routing": False, "routed_scaling_factor": 2.5, "router_dtype": "float32"},
    "sigmoid, k = 1": SIGMOID | {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "sigmoid": SIGMOID,
    "sigmoid, bias": SIGMOID | {"router_expert_bias": True, "routed_scaling_factor": 8.0, "mlp_only_layers": [0]},
    "hash": EXPERTS | {"moe_relu_routing": False, "hash_routing": True, "mlp_only_layers": [0]},
}


def make(name: str, **changes: Any) -> RemoeForCausalLM:
    torch.manual_seed(5)
    model = RemoeForCausalLM(RemoeConfig(**(SIZES | MODELS[name] | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
        for bias in model.buffers():
            if bias.shape == (8,):
                bias.copy_(torch.randn(8) / 4)
    return model.eval()


def tokens(batch: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def build_megatron(model: RemoeForCausalLM, **settings: object) -> tuple[GPTModel, argparse.Namespace]:
    """Convert a model for transformers to Megatron's; return it and its arguments, changed by `settings`."""
    args = argparse.Namespace(**(vars(megatron_args(model.config)) | settings))
    megatron = build(args)
    fill_megatron(megatron, model)
    return megatron, args


def megatron_args(config: RemoeConfig, more: Sequence[str] = ()) -> argparse.Namespace:
    """Return Megatron's arguments for a configuration and more flags."""
    flags = make_flags(config, config.max_position_embeddings)
    return parse_flags([*flags, "--transformer-impl", "local", *more], config)
