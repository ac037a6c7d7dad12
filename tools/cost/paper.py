"""The paper's settings (arXiv 2412.14711, section 4.1 and appendix), to tell where a run differs from them."""

import argparse
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "182m": {"num_layers": 12, "hidden_size": 768, "ffn_hidden_size": 3072, "num_attention_heads": 12},
    "469m": {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "num_attention_heads": 16},
    "978m": {"num_layers": 24, "hidden_size": 1536, "ffn_hidden_size": 6144, "num_attention_heads": 16},
}
COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "rotary_base": 1_000_000,
    "group_query_attention": True,
    "num_query_groups": 4,
    "untie_embeddings_and_output_weights": True,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.01,
    "seq_length": 1024,
    "tokenizer_type": "GPT2BPETokenizer",
    "make_vocab_size_divisible_by": 1024,
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr": 5e-4,
    "min_lr": 5e-5,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.01,
    "clip_grad": 1.0,
    "bf16": True,
    "train_iters": 60_000,
    "global_batch_size": 512,
    "split": "969,30,1",
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "moe_router_topk": 1,
    "moe_granularity": 1,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": None},
    "moe": {
        **EXPERTS,
        "moe_relu_routing": False,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_expert_capacity_factor": None,
    },
    "remoe": {
        **EXPERTS,
        "moe_relu_routing": True,
        "moe_relu_l1_reg_coeff_init": 1e-8,
        "moe_relu_l1_reg_coeff_multiplier": 1.2,
    },
}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide about a run's result, as the user gave them: experts before they are split by G."""
    names = dict.fromkeys([*SIZES["182m"], *COMMON, *(name for routing in ROUTINGS.values() for name in routing)])
    given = {name: _alone(getattr(args, name)) for name in names}
    if given["num_experts"]:
        given["num_experts"] //= args.moe_granularity
        given["moe_router_topk"] //= args.moe_granularity
    return given


def differences(given: dict[str, Any], size: str, routing: str) -> list[tuple[str, str, str]]:
    """What differs from the paper's run of this size and routing.

    Args:
        given: see `settings`.
        size: a key of `SIZES`.
        routing: a key of `ROUTINGS`.

    Returns:
        flag, the value given, the paper's value; in the order of the tables above.
    """
    expected = SIZES[size] | COMMON | ROUTINGS[routing]
    return [
        ("--" + name.replace("_", "-"), _shown(given[name]), _shown(value))
        for name, value in expected.items()
        if given[name] != value
    ]


def _alone(value: Any) -> Any:
    """The value of a flag that takes several, where it has one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
