"""Measure models on Megatron data sets: the loss of Megatron's validation, experts per token, and the speed."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.remoe.hf import RemoeConfig, RemoeForCausalLM
from megatron.remoe.routing.refusals import flag_name

from ...console.display import show_step
from ...console.errors import ToolError
from ..arguments import SEED
from ..hf.opening import OpenedModel
from ..measuring import count_experts, measure_loss, summarize_experts
from ..text import read_batches, read_sequences

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

PROMPTS, ROUNDS, NEW_TOKENS = 8, 5, 32  # for the measurement of speed
MASKS = ("eod_mask_loss", "reset_attention_mask", "reset_position_ids")  # applied only in a run's validation


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


def read_text(args: argparse.Namespace, opened: OpenedModel, prefix: str) -> "GPTDataset":
    """Return the sequences of a data set for a model.

    Their order follows --seed. By default it is the run's, so the loss over all sequences equals that of the run's log.
    """
    config = opened.model.config
    seed = getattr(opened.args, "seed", SEED) if args.seed is None else args.seed
    return read_sequences(prefix, opened.sequence_length(args.seq_length), seed, config.vocab_size)


def measure_text(args: argparse.Namespace, models: dict[str, OpenedModel], results: dict[str, Any]) -> None:
    """Fill `results["text"]`: model → data set → bound on the experts per token, or "none" → measurements.

    Measurements are the fields of `TextLoss`, and "experts": number of a layer with experts → the result of
    `summarize_experts`. They are added as soon as they are complete.

    Raises:
        UsageError: a model does not support a bound (checked first), or a data set is broken or does not fit a model.
    """
    for name, opened in models.items():
        for bound in args.max_experts_per_token:
            check_bound(name, opened.model.config, bound)
    for name, opened in models.items():
        if ignored := [flag_name(mask) for mask in MASKS if getattr(opened.args, mask, False)]:
            print(f"{name}: evaluated without {', '.join(ignored)}", flush=True)
        model = opened.model
        for prefix in args.data_path:
            data = read_text(args, opened, prefix)
            for bound in [None, *args.max_experts_per_token]:
                with (
                    show_step(f"{name}, {Path(prefix).name}", min(len(data), args.sequences or len(data))) as advance,
                    bound_experts(model, bound),
                    count_experts(model) as counts,
                ):
                    batches = read_batches(data, args.sequences, model.config.vocab_size)
                    measured = measure_loss(model, batches, advance)
                experts = dict(zip(opened.layer_numbers(), map(summarize_experts, counts.values()), strict=True))
                result = measured._asdict() | {"experts": experts}
                bounds = results.setdefault("text", {}).setdefault(name, {}).setdefault(prefix, {})
                bounds["none" if bound is None else str(bound)] = result


@torch.inference_mode()
def measure_speed(args: argparse.Namespace, opened: dict[str, OpenedModel]) -> dict[str, dict[str, float]]:
    """Time the models in turns, so that other work on the machine slows all of them.

    Each reads the first halves of `PROMPTS` sequences as one batch, and continues each of them by `NEW_TOKENS` tokens.

    Returns:
        model → tokens per second of the whole batch, in reading ("prefill") and in writing ("decode"), from the median
        times of the rounds.
    """
    data = read_text(args, next(iter(opened.values())), args.data_path[0])
    batches = read_batches(data, PROMPTS, min(each.model.config.vocab_size for each in opened.values()))
    prompts = torch.cat(list(batches))[:, : max(1, data.config.sequence_length // 2)]
    length = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}

    def seconds(device: torch.device, work: Callable[..., object], **settings: object) -> float:
        ids = prompts.to(device)
        wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        work(ids, **settings)
        wait()
        return time.perf_counter() - started

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
    for _ in range(ROUNDS + 1):
        for name, (model, *_) in opened.items():
            reading = seconds(model.device, model, logits_to_keep=1, use_cache=True)
            mask = torch.ones_like(prompts).to(model.device)
            whole = seconds(model.device, model.generate, attention_mask=mask, **length)
            times[name].append((reading, whole - reading))
    result = {}
    for name, rounds in times.items():
        reading, writing = (statistics.median(part) for part in zip(*rounds[1:], strict=True))  # the first warms up
        result[name] = {"prefill": prompts.numel() / reading, "decode": len(prompts) * (NEW_TOKENS - 1) / writing}
    return result
