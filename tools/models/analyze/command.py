"""Count, write and show how a model routes."""

import argparse
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...console.display import print_table
from ...console.errors import ToolError
from ...console.files import write_json
from ...runs.names import name_data_sets
from ...runs.running import make_main
from ..arguments import parse_analyze
from ..hf.opening import open_model
from ..text import read_sequences
from . import findings, pictures
from .flips import measure_flips

LEGEND = """\
experts per token: mean, share of tokens with none, 99th percentile, most
sparsity: share of inactive pairs of tokens and experts
imbalance: load of the busiest expert over the mean load
dead: experts that no token uses; inactive: experts with less than an eighth of the even share of tokens
domain bits: mutual information of a token's expert and its text"""
TITLES = "layer,mean,none,99 %,most,sparsity,imbalance,dead,inactive,domain bits".split(",")


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str | None:
    """Return a token's text, or its name in the vocabulary if it is part of a character; None without a tokenizer."""
    if tokenizer is None:
        return None
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\N{REPLACEMENT CHARACTER}" in text else text


def show(results: dict[str, Any]) -> None:
    """Print a table with a row for each layer."""
    special, rows = results["load"]["specialization"], []
    for layer, experts in results["experts_per_token"]["layers"].items():
        balance = results["balance"]["layers"][layer]
        row = [str(layer), f"{experts['mean']:.3f}", f"{experts['none']:.1%}", str(experts["percentile_99"])]
        row += [str(experts["largest"]), f"{balance['sparsity']:.4f}"]
        row += [f"{balance['imbalance']:.2f}" if balance["imbalance"] else ""]
        row += [str(len(balance["dead"])), str(len(balance["inactive"]))]
        rows.append([*row, f"{special[layer]:.4f}" if special else ""])
    print_table(TITLES, rows, text=0)
    print(LEGEND)


def analyze(args: argparse.Namespace) -> None:
    """Count how a model routes, write files and pictures, and print a table.

    Raises:
        UsageError: something is wrong with the flags, the model or the data.
        OSError: --output-dir cannot be written.
    """
    if args.flips:
        return measure_flips(args)
    opened = open_model(args.load, args.ckpt_step, args.tokenizer_model, needs_tokenizer=False)
    model = opened.model
    topk, experts = model.config.mean_experts_per_token, model.config.num_experts
    if not (layers := opened.layer_numbers()):
        raise ToolError(f"--load {args.load}: is a dense model, which routes nothing.", "REMOE-E501")
    length = opened.sequence_length(args.seq_length)
    texts = [read_sequences(prefix, length, args.seed, model.config.vocab_size) for prefix in args.data_path]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    counts = findings.count_routing(model, texts, layers, args.sequences)
    names = name_data_sets(args.data_path)
    results = {
        "experts_per_token": findings.experts_per_token(counts),
        "load": findings.load(counts, names, topk / experts, partial(token_text, opened.tokenizer)),
        "balance": findings.balance(counts, topk),
    }
    for name, numbers in results.items():
        write_json(args.output_dir / f"{name}.json", numbers)
    pictures.draw_experts_per_token(args.output_dir / "experts_per_token.png", results["experts_per_token"])
    pictures.draw_load(args.output_dir / "load.png", results["load"])
    show(results)
    print(f"Files: {args.output_dir}")


main = make_main("analyze", parse_analyze, analyze)
