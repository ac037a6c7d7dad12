"""Measure the loss on a Megatron data set as Megatron's validation does, and count experts per token."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from megatron.remoe.routing.refusals import flag

from ...console.display import Display
from ...console.errors import ToolError
from ..hf.opening import OpenedModel
from ..measuring import count_experts, find_blocks, measure_loss, summarize_experts
from ..text import read_batches, read_sequences

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

SEED = 1234  # Megatron's default
MASKS = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")  # applied in a training's validation only


def check_bound(name: str, config: RemoeConfig, most: int) -> None:
    """Check that a model can use only its K largest gates.

    Raises:
        ToolError: it has no ReLU router, or fewer experts.
    """
    if not (config.num_experts and config.moe_relu_routing):
        raise ToolError(f"--max-experts-per-token: {name} has no ReLU routing.", "REMOE-E501")
    if not 1 <= most <= config.num_experts:
        problem = f"must be 1 to {config.num_experts} for {name}"
        raise ToolError(f"--max-experts-per-token {most}: {problem}.", "REMOE-E501")


@contextmanager
def bound_experts(model: RemoeForCausalLM, most: int | None) -> Iterator[None]:
    """Use only the K largest gates inside the block, or the model's own bound (None)."""
    own, blocks = model.config.max_experts_per_token, find_blocks(model).values()
    if most is not None:
        model.config.max_experts_per_token = most
        for block in blocks:
            block.all_active = False
    yield
    if most is not None:
        model.config.max_experts_per_token = own
        for block in blocks:
            block.all_active = own is None


def read_text(args: argparse.Namespace, opened: OpenedModel, prefix: str) -> "GPTDataset":
    """Return the sequences of a data set for a model: by default in the training's order, so the loss is the log's."""
    config = opened.model.config
    seed = getattr(opened.args, "seed", SEED) if args.seed is None else args.seed
    return read_sequences(prefix, opened.sequence_length(args.seq_length), seed, config.vocab_size)


def measure_text(
    args: argparse.Namespace, models: dict[str, OpenedModel], display: Display, results: dict[str, Any]
) -> None:
    """Add model → data set → bound on the experts per token, or "none" → measurements, each when it is complete.

    Measurements are "loss" in nats per token; "tokens", the number of predicted ones; and "experts": number of a layer
    with experts, from 1 → what `summarize_experts` returns.

    Raises:
        ToolError: a model does not take a bound, before anything is measured; a data set does not fit the model.
    """
    for name, opened in models.items():
        for most in args.max_experts_per_token:
            check_bound(name, opened.model.config, most)
    measured = results["text"] = {name: {prefix: {} for prefix in args.data_path} for name in models}
    for name, opened in models.items():
        if ignored := [flag(mask) for mask in MASKS if getattr(opened.args, mask, False)]:
            display.say(f"{name}: evaluated without {', '.join(ignored)}")
        model = opened.model
        for prefix in args.data_path:
            data = read_text(args, opened, prefix)
            for most in [None, *args.max_experts_per_token]:
                with (
                    display.step(f"{name}, {Path(prefix).name}", min(len(data), args.sequences or len(data))),
                    bound_experts(model, most),
                    count_experts(model) as counts,
                ):
                    batches = read_batches(data, args.sequences, model.config.vocab_size)
                    loss, tokens = measure_loss(model, batches, display)
                experts = {layer: summarize_experts(histogram) for layer, histogram in counts.items()}
                one = {"loss": loss, "tokens": tokens, "experts": experts}
                measured[name][prefix]["none" if most is None else str(most)] = one
