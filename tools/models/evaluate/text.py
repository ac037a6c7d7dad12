"""Measure the loss on a Megatron data set as Megatron's validation does, and count experts per token."""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch.nn.functional import cross_entropy

from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.remoe.hf import RemoeForCausalLM
from megatron.remoe.routing.refusals import flag

from ...console.display import Display
from ...console.errors import ToolError
from ..expert_counts import count_experts, expert_blocks, summarize_experts
from ..hf.opening import OpenedModel
from ..text import check_vocabulary, open_data_set

TOKENS_PER_FORWARD = 4096
SEED = 1234  # Megatron's default
MASKS = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")  # applied in a training's validation only


def sequences(prefix: str, length: int, seed: int, vocabulary: int) -> GPTDataset:
    """Return a data set's sequences as Megatron's `--full-validation` takes them: one epoch, in the order of a seed.

    Args:
        prefix: of the .bin and .idx files.
        length: tokens of a sequence, without the one after the last.
        seed: Megatron's --seed.
        vocabulary: number of tokens that the model knows.

    Raises:
        ToolError: the files are missing, corrupt or too small.
    """
    open_data_set(prefix, length + 1)
    # Megatron asks for a tokenizer; nothing here depends on it.
    tokenizer = SimpleNamespace(vocab_size=vocabulary, eod=0, pad=-1, unique_identifiers={})
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=length,
            blend=([prefix], None),
            split="0,100,0",
            path_to_cache=cache,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        data = GPTDataset.build_low_level_dataset(prefix, config)
        documents = numpy.arange(len(data.document_indices) - 1, dtype=numpy.int32)
        return GPTDataset(data, prefix, documents, None, Split.valid, config)


def batches(data: GPTDataset, most: int | None) -> Iterator[torch.Tensor]:
    """Yield the sequences, at most `most`, as int64 `[batch, length + 1]`."""
    length, number = data.config.sequence_length, min(len(data), most or len(data))
    size = max(1, TOKENS_PER_FORWARD // length)
    for start in range(0, number, size):
        samples = [data[index] for index in range(start, min(number, start + size))]
        yield torch.stack([torch.cat([sample["tokens"], sample["labels"][-1:]]) for sample in samples])


@torch.inference_mode()
def measure(model: RemoeForCausalLM, data: GPTDataset, most: int | None, display: Display) -> dict[str, Any]:
    """Run the model over at most `most` sequences of a data set.

    Returns:
        "loss" in nats per token; "tokens": number of predicted ones; "experts": number of a layer with experts, from
        1 → what `summarize_experts` returns.

    Raises:
        ToolError: the data set holds a token that the model does not know.
    """
    total, tokens = 0.0, 0
    histograms: dict[int, torch.Tensor] = {}
    for batch in batches(data, most):
        check_vocabulary(data.dataset_path, int(batch.max()), model.config.vocab_size)
        batch = batch.to(model.device)
        with count_experts(model) as counts:
            logits = model(batch[:, :-1], use_cache=False).logits
        labels = batch[:, 1:].reshape(-1)
        total += float(cross_entropy(logits.flatten(0, 1).float(), labels, reduction="none").double().sum())
        tokens += labels.numel()
        for layer, passes in counts.items():
            new = torch.bincount(torch.cat(passes), minlength=model.config.num_experts + 1).cpu()
            histograms[layer] = histograms.get(layer, 0) + new
        display.advance(len(batch))
    experts = {layer: summarize_experts(histogram) for layer, histogram in histograms.items()}
    return {"loss": total / tokens, "tokens": tokens, "experts": experts}


def bound_experts(name: str, model: RemoeForCausalLM, most: int | None) -> None:
    """Use only the K largest gates, as `max_experts_per_token` in the configuration does when a model is loaded.

    Raises:
        ToolError: the model has no ReLU router, or fewer experts.
    """
    config = model.config
    if not (config.num_experts and config.moe_relu_routing):
        raise ToolError(f"--max-experts-per-token: {name} has no ReLU routing.", "REMOE-E501")
    if most is not None and not 1 <= most <= config.num_experts:
        problem = f"must be 1 to {config.num_experts} for {name}"
        raise ToolError(f"--max-experts-per-token {most}: {problem}.", "REMOE-E501")
    config.max_experts_per_token = most
    for block in expert_blocks(model).values():
        block.all_active = most is None


def read_text(args: argparse.Namespace, opened: OpenedModel, prefix: str) -> GPTDataset:
    """Return the sequences of a data set for a model: by default in the training's order, so the loss is the log's."""
    config = opened.model.config
    seed = getattr(opened.args, "seed", SEED) if args.seed is None else args.seed
    return sequences(prefix, opened.sequence_length(args.seq_length), seed, config.vocab_size)


def measure_text(
    args: argparse.Namespace, models: dict[str, OpenedModel], display: Display, results: dict[str, Any]
) -> None:
    """Add model → data set → bound on the experts per token, or "none" → measurements, each when it is complete.

    Raises:
        ToolError: a model does not take a bound; nothing was measured yet.
    """
    own_bounds = {name: opened.model.config.max_experts_per_token for name, opened in models.items()}
    for name, opened in models.items():
        for most in [*args.max_experts_per_token, own_bounds[name]] if args.max_experts_per_token else []:
            bound_experts(name, opened.model, most)
    found = results["text"] = {name: {prefix: {} for prefix in args.data_path} for name in models}
    for name, opened in models.items():
        if ignored := [flag(mask) for mask in MASKS if getattr(opened.args, mask, False)]:
            display.say(f"{name}: evaluated without {', '.join(ignored)}")
        model = opened.model
        for prefix in args.data_path:
            data = read_text(args, opened, prefix)
            for most in [None, *args.max_experts_per_token]:
                if most is not None:
                    bound_experts(name, model, most)
                with display.step(f"{name}, {Path(prefix).name}", min(len(data), args.sequences or len(data))):
                    measured = measure(model, data, args.sequences, display)
                found[name][prefix]["none" if most is None else str(most)] = measured
            if args.max_experts_per_token:
                bound_experts(name, model, own_bounds[name])
