"""Measure flips: routing decisions that change from one checkpoint of a run to the next (figure 10 of the paper)."""

import argparse
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch

from megatron.remoe.start.checkpoint_files import newest_complete

from ...console.display import print_table, show_step
from ...console.errors import ToolError
from ...console.files import write_json
from ...recipes.on_cpu import megatron_on_cpu
from ..hf.opening import OpenedModel, open_run
from ..measuring import compute_logits, watch_routers
from ..text import read_batches, read_sequences
from .findings import Numbers

KEYS = "rate", "count", "changed_tokens"
TITLES = "iterations", "layer", "flip rate", "flip count", "changed tokens"


def count_flips(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Compare two routing maps of the same tokens, bool `[..., E]`.

    Returns:
        - "rate": share of the (token, expert) pairs that became active or inactive: mean of (before ≠ after);
        - "count": number of such pairs per token and layer: E · rate;
        - "changed_tokens": share of tokens, over all layers, whose set of experts changed. If top-1 sends a token to a
          different expert, it counts once here and twice in the rate.
    """
    changed = before != after
    rate = int(changed.sum()) / changed.numel()
    tokens = changed.any(dim=-1)
    return {"rate": rate, "count": changed.shape[-1] * rate, "changed_tokens": int(tokens.sum()) / tokens.numel()}


@torch.inference_mode()
def read_maps(root: Path, iteration: int, args: argparse.Namespace) -> dict[int, torch.Tensor]:
    """Return layer number → the routing map of all data sets by a run's checkpoint, bool `[tokens, E]`."""
    from ..hf.weights import convert_model  # imports Megatron

    run, maps = open_run(root, iteration), defaultdict[int, list[torch.Tensor]](list)
    opened = OpenedModel(convert_model(run.model, run.config), None, run.saved)
    length, vocabulary = opened.sequence_length(args.seq_length), opened.model.config.vocab_size
    with watch_routers(opened.model, lambda number, active: maps[number].append(active)):
        for prefix in args.data_path:
            text = read_sequences(prefix, length, args.seed, vocabulary)
            for batch in read_batches(text, args.sequences, vocabulary):
                compute_logits(opened.model, batch[:, :-1])
    if not maps:
        raise ToolError(f"--load {root}: is a dense model, which routes nothing.", "REMOE-E501")
    return dict(zip(opened.layer_numbers(), map(torch.cat, maps.values()), strict=True))


def measure_flips(args: argparse.Namespace) -> None:
    """Route the same text with each complete checkpoint of a run, write flips.json, and print a table.

    Raises:
        UsageError: --load has fewer than two complete checkpoints, or something is wrong with the model or the data.
        OSError: --output-dir cannot be written.
    """
    megatron_on_cpu()
    from ..checkpoints import find_folder  # imports Megatron

    root, iterations = find_folder(args.load, None).parent, list[int]()
    while (number := newest_complete(root, below=iterations[0] if iterations else None)) is not None:
        iterations.insert(0, number)
    if len(iterations) < 2:
        raise ToolError(f"--load {root}: has no two complete checkpoints. Train with --save-interval.", "REMOE-E404")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pairs: list[Numbers] = []
    with show_step("checkpoints", len(iterations)) as advance:
        for (start, before), (end, after) in pairwise((each, read_maps(root, each, args)) for each in iterations):
            layers = {number: count_flips(before[number], after[number]) for number in after}
            mean = count_flips(*(torch.stack([*maps.values()]) for maps in (before, after)))
            pairs.append({"from": start, "to": end, **mean, "layers": layers})
            advance(1)
    write_json(args.output_dir / "flips.json", pairs)
    rows = [
        [f"{pair['from']} to {pair['to']}", str(layer), *(f"{flips[key]:.6f}" for key in KEYS)]
        for pair in pairs
        for layer, flips in {"all": pair, **pair["layers"]}.items()
    ]
    print_table(TITLES, rows, text=1)
    print(f"Figures: {args.output_dir / 'flips.json'}")
