"""Measure models on Megatron data sets: the loss of Megatron's validation, and experts per token."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM

from ..console.display import print_table, show_step
from ..console.errors import ToolError
from ..console.files import write_json
from ..runs.names import name_data_sets, name_models
from ..runs.running import make_main
from .arguments import SEED, parse_evaluate
from .hf.opening import OpenedModel, open_model
from .hf.tokenizer import count_token_bytes
from .measuring import count_experts, measure_loss, summarize_experts
from .text import read_batches, read_sequences

REPEATS, BY_LAYER = "repeats", "by layer"
TITLES = ("model", "data set", "K", "nats/token", "nats/byte", REPEATS, "experts", BY_LAYER)
EXPLAINED = {
    REPEATS: "Repeats: nats/token where the text repeats a pair of tokens in the sequence.",
    BY_LAYER: "By layer: experts per token (mean / 99th percentile / maximum).",
}


def check_bound(name: str, config: RemoeConfig, bound: int) -> None:
    """Check that a model can use only its K = `bound` largest gates.

    Raises:
        ToolError: it has no ReLU router, or `bound` is not between 1 and its number of experts.
    """
    if not (config.moe_relu_routing and 1 <= bound <= config.num_experts):
        problem = f"{name} needs ReLU routing, and K from 1 to {config.num_experts}"
        raise ToolError(f"--max-experts-per-token {bound}: {problem}.", "REMOE-E501")


@contextmanager
def bound_experts(model: RemoeForCausalLM, bound: int | None) -> Iterator[None]:
    """Use only the K = `bound` largest gates inside the block; None keeps the model's own bound."""
    before = model.config.max_experts_per_token
    model.config.max_experts_per_token = bound or before
    try:
        yield
    finally:
        model.config.max_experts_per_token = before


def measure_text(args: argparse.Namespace, models: dict[str, OpenedModel]) -> dict[str, Any]:
    """Return model → data set → bound on the experts per token, or "none" → measurements.

    Measurements are the fields of `TextLoss`, and "experts": number of a layer with experts → the result of
    `summarize_experts`.

    Raises:
        UsageError: a model does not support a bound (checked first), or a data set is broken or does not fit a model.
    """
    results: dict[str, Any] = {}
    for name, opened in models.items():
        for bound in args.max_experts_per_token:
            check_bound(name, opened.model.config, bound)
    for name, opened in models.items():
        model, tokenizer = opened.model, opened.tokenizer
        # In the run's order by default, so that the loss over all sequences equals that of the run's log.
        seed = getattr(opened.args, "seed", SEED) if args.seed is None else args.seed
        lengths = count_token_bytes(tokenizer, model.config.vocab_size) if tokenizer else None
        for prefix in args.data_path:
            data = read_sequences(prefix, opened.sequence_length(args.seq_length), seed, model.config.vocab_size)
            for bound in [None, *args.max_experts_per_token]:
                with (
                    show_step(f"{name}, {Path(prefix).name}", min(len(data), args.sequences or len(data))) as advance,
                    bound_experts(model, bound),
                    count_experts(model) as counts,
                ):
                    batches = read_batches(data, args.sequences, model.config.vocab_size)
                    measured = measure_loss(model, batches, advance, lengths)
                experts = dict(zip(opened.layer_numbers(), map(summarize_experts, counts.values()), strict=True))
                result = measured._asdict() | {"experts": experts}
                bounds = results.setdefault(name, {}).setdefault(prefix, {})
                bounds["none" if bound is None else str(bound)] = result
    return results


def show(results: dict[str, Any]) -> None:
    """Print the results of `measure_text` as a table, without columns that say nothing."""
    rows = []
    for model, sets in zip(name_models([*map(Path, results)]), results.values(), strict=True):
        for data_set, bounds in zip(name_data_sets([*sets]), sets.values(), strict=True):
            for bound, measured in bounds.items():
                layers = measured["experts"].values()
                mean = f"{sum(layer['mean'] for layer in layers) / len(layers):.3f}" if layers else ""
                by_layer = (f"{layer['mean']:.2f}/{layer['percentile_99']}/{layer['largest']}" for layer in layers)
                losses = (measured[name] for name in ("loss", "loss_per_byte", "repeats_loss"))
                cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
                rows.append([model, data_set, "own" if bound == "none" else bound, *cells, mean, " ".join(by_layer)])
    kept = [place for place in range(len(TITLES)) if {row[place] for row in rows} - {"", "own"}]
    titles = [TITLES[place] for place in kept]
    print_table(titles, [[row[place] for place in kept] for row in rows], text=len(kept))
    for title, text in EXPLAINED.items():
        if title in titles:
            print(text)


def evaluate(args: argparse.Namespace) -> None:
    """Measure, show and write the results.

    Raises:
        UsageError: something is wrong with the flags, a model or the data.
        OSError: --output cannot be written.
    """
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    models = {str(place): open_model(place, args.ckpt_step, args.tokenizer_model, False) for place in args.load}
    results = measure_text(args, models)
    show(results)
    if args.output is not None:
        write_json(args.output, {"text": results})


main = make_main("evaluate", parse_evaluate, evaluate)
