"""Count, write and show how a model routes."""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...console.display import Display, print_table
from ...console.errors import ToolError
from ...console.files import write_json
from ...runs.evaluations import names_of_data_sets
from ...runs.running import run_tool
from ..expert_counts import expert_blocks
from ..hf.opening import OpenedModel, open_model
from ..text import Text
from . import findings, pictures
from .arguments import WINDOW, parse_arguments
from .counts import count


def layer_numbers(opened: OpenedModel) -> list[int]:
    """Return Megatron's numbers, from 1, of layers with experts; a HybridModel has attention in layers before them."""
    step = 2 if getattr(opened.args, "hybrid_layer_pattern", None) else 1
    return [step * number for number in expert_blocks(opened.model)]


def text_of(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str | None:
    """Return a token's text, or its name in the vocabulary if it is part of a character; None without a tokenizer."""
    if tokenizer is None:
        return None
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\N{REPLACEMENT CHARACTER}" in text else text


def show(found: dict[str, Any]) -> None:
    """Print two lines for each layer."""
    special, ranks = found["load"]["specialization"], found["balance"]["expert_parallel"]
    tables: tuple[list[dict[str, str]], list[dict[str, str]]] = [], []
    for layer, experts in found["experts_per_token"]["layers"].items():
        balance, near, gate = (found[name]["layers"][layer] for name in ("balance", "neighbours", "gates"))
        over_even = [balance["imbalance"], balance["rank_imbalance"]][: 1 + (ranks > 1)]
        tables[0].append(
            {
                "layer": str(layer),
                "experts per token": f"{experts['mean']:.3f}",
                "none": f"{experts['none']:.1%}",
                "99 %": str(experts["percentile_99"]),
                "largest": str(experts["largest"]),
                "sparsity": f"{balance['sparsity']:.4f}",
                "imbalance" + ", of ranks" * (ranks > 1): ", ".join(f"{one:.2f}" for one in over_even if one),
                "dead": str(len(balance["dead"])),
                "inactive": str(len(balance["inactive"])),
            }
        )
        bits = ""
        if special:
            shuffled = special[layer]["shuffled"]
            bits = f"{special[layer]['bits']:.4f} ({'too few' if shuffled is None else f'{shuffled:.4f}'})"
        tables[1].append(
            {
                "layer": str(layer),
                "common (chance)": f"{near['common']:.1%} ({near['common_by_chance']:.1%})",
                f"of {WINDOW} tokens (chance)": f"{near['union']:.2f} ({near['union_by_chance']:.2f})",
                "gate": f"{gate['median']:.3g}" if gate else "",
                "largest has": f"{gate['largest_output']:.1%}" if gate else "",
                "domain bits (shuffled)": bits,
            }
        )
    for rows in tables:
        print_table([*rows[0]], [[*row.values()] for row in rows], text=0)
        print()
    both = found["losses"]["correlation"]["all"]
    if both["own"] is not None:
        own, following = both["own"], both["next"]
        print(f"Correlation of a token's experts with its loss: {own:+.3f}, with the next token's: {following:+.3f}\n")


def analyze(args: argparse.Namespace) -> None:
    """Count, write and show.

    Raises:
        ToolError: something is wrong with the flags, the model or the data.
        OSError: --output-dir cannot be written.
    """
    opened = open_model(args.load, args.ckpt_step, args.tokenizer_model, needs_tokenizer=False)
    model = opened.model
    topk, experts = model.config.num_experts_per_tok, model.config.num_experts
    if not (layers := layer_numbers(opened)):
        raise ToolError(f"--load {args.load}: is a dense model, which routes nothing.", "REMOE-E501")
    if experts % args.expert_model_parallel_size:
        raise ToolError(
            f"--expert-model-parallel-size {args.expert_model_parallel_size}: does not divide the model's "
            f"{experts} experts.",
            "REMOE-E501",
        )
    length = opened.sequence_length(args.seq_length)
    texts = [Text(prefix, length, args.seed, model.config.vocab_size) for prefix in args.data_path]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    counts = count(model, texts, layers, args.sequences, Display())
    names = names_of_data_sets(args.data_path)
    found = {
        "experts_per_token": findings.experts_per_token(counts),
        "load": findings.load(counts, names, topk / experts, partial(text_of, opened.tokenizer)),
        "balance": findings.balance(counts, topk, args.expert_model_parallel_size),
        "neighbours": findings.neighbours(counts),
        "gates": findings.gates(counts),
        "losses": findings.losses(counts),
    }
    for name, numbers in found.items():
        write_json(args.output_dir / f"{name}.json", numbers)
        pictures.draw(args.output_dir / f"{name}.png", name, numbers)
    show(found)
    print(f"Pictures and figures: {args.output_dir}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)
    return run_tool("analyze", lambda: analyze(args))
