"""What the paper's runs were (arXiv 2412.14711, section 4.1), and where it does not say, its authors' scripts.

`fork.json` holds these scripts' values; tools/fork_settings.py writes it.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

FORK = Path(__file__).with_name("fork.json")

SIZES: dict[str, dict[str, Any]] = {
    "182m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "469m": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
    "978m": {"num_layers": 24, "hidden_size": 1536, "num_attention_heads": 16},
}
COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 4,
    "seq_length": 1024,
    "tokenizer_type": "GPT2BPETokenizer",
    "optimizer": "adam",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr": 5e-4,
    "lr_decay_style": "cosine",
    "train_iters": 60_000,
    "global_batch_size": 512,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_router_topk": 1, "moe_granularity": 1}
ROUTINGS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": None},
    "moe": {
        **EXPERTS,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_warmup_topk": None,
    },
    "remoe": {
        **EXPERTS,
        "moe_relu_l1_reg_coeff_init": 1e-8,
        "moe_relu_l1_reg_coeff_multiplier": 1.2,
        "moe_relu_l1_reg_load_balancing": True,
        "moe_relu_router_bias": False,
    },
}
# Settings of the fork's scripts that bear on the result and that the paper does not give, by the routings they concern.
FORKS = """
    micro_batch_size ffn_hidden_size rotary_base rotary_percent untie_embeddings_and_output_weights add_bias_linear
    add_qkv_bias qk_layernorm layernorm_epsilon attention_dropout hidden_dropout init_method_std seed bf16
    fp32_residual_connection apply_query_key_layer_scaling attention_softmax_in_fp32 make_vocab_size_divisible_by
    adam_eps weight_decay start_weight_decay end_weight_decay weight_decay_incr_style clip_grad min_lr lr_decay_iters
    lr_warmup_fraction lr_warmup_init data_path split reset_position_ids reset_attention_mask eod_mask_loss
    calculate_per_token_loss dataloader_type eval_interval eval_iters
""".split()
FORKS_EXPERTS = """
    moe_relu_routing moe_layer_freq moe_shared_expert_intermediate_size moe_z_loss_coeff moe_input_jitter_eps
    moe_expert_capacity_factor
""".split()
FORKS_TOPK = ["moe_router_pre_softmax"]  # given for ReMoE too, and ignored there
NAMES = [*FORKS, *FORKS_EXPERTS, *FORKS_TOPK]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide about a run's result, as the user gave them: experts before they are split by G."""
    stated = [*SIZES["182m"], *COMMON, *(name for routing in ROUTINGS.values() for name in routing)]
    given = {name: _alone(getattr(args, name)) for name in dict.fromkeys([*stated, *NAMES])}
    if given["num_experts"]:
        given["num_experts"] //= args.moe_granularity
        given["moe_router_topk"] //= args.moe_granularity
    if args.hybrid_layer_pattern:
        given["num_layers"] = _of_gpt(args.hybrid_layer_pattern.replace("|", ""), "*E" if args.num_experts else "*-")
    return given


def _of_gpt(pattern: str, layer: str) -> int | str:
    """The number of GPTModel's layers that a HybridModel's amount to; the pattern where they are others."""
    number = len(pattern) // len(layer)
    return number if pattern == number * layer else pattern


def expected(size: str, routing: str) -> dict[str, tuple[Any, str]]:
    """Name of a setting → its value in the paper's run, and who gives it: "paper" or "fork".

    Args:
        size: a key of `SIZES`.
        routing: a key of `ROUTINGS`.
    """
    table = json.loads(FORK.read_text(encoding="utf-8"))["settings"]
    fork = table["all"] | table[f"{size}_{routing}"]
    names = [*FORKS, *(FORKS_EXPERTS if routing != "dense" else []), *(FORKS_TOPK if routing == "moe" else [])]
    paper = SIZES[size] | COMMON | ROUTINGS[routing]
    return {name: (value, "paper") for name, value in paper.items()} | {name: (fork[name], "fork") for name in names}


def differences(given: dict[str, Any], size: str, routing: str) -> list[tuple[str, str, str, str]]:
    """What differs from the paper's run of this size and routing.

    Args:
        given: see `settings`.
        size: a key of `SIZES`.
        routing: a key of `ROUTINGS`.

    Returns:
        flag, the value given, the expected value, and who gives that; see `expected`.
    """
    found = []
    for name, (value, source) in expected(size, routing).items():
        here, there = (data_sets(data) if name == "data_path" else data for data in (given[name], value))
        if here != there:
            found.append(("--" + name.replace("_", "-"), _shown(here), _shown(there), source))
    return found


def data_sets(words: list[str] | str | None) -> str:
    """Data sets and weights of --data-path, without their folders and the ends that preprocessing gives to names."""
    words = [words] if isinstance(words, str) else words or []
    weighted = len(words) > 1 and re.fullmatch(r"[0-9.]+", words[0])
    prefixes, weights = (words[1::2], words[::2]) if weighted else (words, [])
    names = [re.sub(r"^pile_(?=\d)|(_text)?_document$", "", Path(prefix).name) for prefix in prefixes]
    if len(names) < 2:
        return "".join(names) or "none"
    if len(set(map(float, weights))) > 1:
        return ", ".join(f"{weight} {name}" for weight, name in zip(weights, names, strict=True))
    numbers = [int(name) if name.isdecimal() else -1 for name in names]
    in_order = numbers[0] >= 0 and numbers == [*range(numbers[0], numbers[0] + len(names))]
    told = f"{names[0]} to {names[-1]}" if in_order else ", ".join(names)
    return f"{told}, {'equally' if weights else 'by size'}"


def _alone(value: Any) -> Any:
    """The value of a flag that takes several, where it has one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
