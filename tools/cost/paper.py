"""The settings of the paper's runs (arXiv 2412.14711, section 4.1), and of its authors' scripts where it has none.

`fork.json` holds both; the scripts' were read by their own parser, at the commit that it names.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..recipes.models import PAPER

FORK = Path(__file__).with_name("fork.json")
# Settings of the fork's scripts that affect the result and that the paper does not give, by the routings they concern.
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
DIMENSIONS = ("num_layers", "hidden_size", "num_attention_heads")
NAMES = [*FORKS, *FORKS_EXPERTS, *FORKS_TOPK]


def _table() -> dict[str, Any]:
    return dict(json.loads(FORK.read_text(encoding="utf-8")))


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that affect a run's result, as the user gave them: experts before granularity splits them."""
    stated = [name for of_routing in _table()["paper"].values() for name in of_routing]
    given = {name: _single(getattr(args, name)) for name in dict.fromkeys([*DIMENSIONS, *stated, *NAMES])}
    if given["num_experts"]:
        given["num_experts"] //= args.moe_granularity
        given["moe_router_topk"] //= args.moe_granularity
    if args.hybrid_layer_pattern:
        given["num_layers"] = _of_gpt(args.hybrid_layer_pattern.replace("|", ""), "*E" if args.num_experts else "*-")
    return given


def _of_gpt(pattern: str, layer: str) -> int | str:
    """Return the number of GPTModel layers that a HybridModel's are equal to, or the pattern if there are none."""
    number = len(pattern) // len(layer)
    return number if pattern == number * layer else pattern


def expected(size: str, routing: str) -> dict[str, tuple[Any, str]]:
    """Return the value of each setting in the paper's run, with its source: "paper" or "fork".

    Args:
        size: a key of `PAPER`.
        routing: dense, moe or remoe.
    """
    table, model = _table(), PAPER[size]
    fork = table["settings"]["all"] | table["settings"][f"{size}_{routing}"]
    names = [*FORKS, *(FORKS_EXPERTS if routing != "dense" else []), *(FORKS_TOPK if routing == "moe" else [])]
    paper = dict(zip(DIMENSIONS, (model.layers, model.hidden, model.heads), strict=True))
    paper |= table["paper"]["all"] | table["paper"][routing]
    return {name: (value, "paper") for name, value in paper.items()} | {name: (fork[name], "fork") for name in names}


def lines(given: dict[str, Any], size: str, routing: str) -> Iterator[str]:
    """Yield the settings that differ from the paper's run.

    Args:
        given: see `settings`.
        size: a key of `PAPER`.
        routing: dense, moe or remoe.
    """
    found = []
    for name, (value, source) in expected(size, routing).items():
        here, there = (data_sets(data) if name == "data_path" else data for data in (given[name], value))
        if here != there:
            found.append(f"  --{name.replace('_', '-')} {_shown(here)}   ({source}: {_shown(there)})")
    yield f"Settings that differ from the paper's {size.upper()} {routing}: {'' if found else 'none'}"
    yield from found


def data_sets(words: list[str] | str | None) -> str:
    """Return data sets and weights of --data-path in words, without folders and the ends that preprocessing adds."""
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
    shown = f"{names[0]} to {names[-1]}" if in_order else ", ".join(names)
    return f"{shown}, {'equally' if weights else 'by size'}"


def _single(value: Any) -> Any:
    """Return the value of a flag that takes several, if it has only one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
