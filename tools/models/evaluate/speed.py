"""Measure how fast models read and write on this machine."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from ...console.errors import ConversionError
from ..hf.opening import OpenedModel
from ..text import read_batches
from .text import read_text

PROMPTS = 8
ROUNDS = 5
NEW_TOKENS = 32


@torch.inference_mode()
def measure_speed(args: argparse.Namespace, opened: dict[str, OpenedModel]) -> dict[str, dict[str, float]]:
    """Time the models in turns, so that other work on the machine slows all of them.

    Each reads half of some sequences at once, and continues them by `NEW_TOKENS`.

    Returns:
        model → tokens per second over the batch, medians of the rounds: of reading ("prefill") and of writing
        ("decode").

    Raises:
        ConversionError: the models are on different devices.
    """
    models = [one.model for one in opened.values()]
    if len({model.device for model in models}) > 1:
        raise ConversionError(
            "--speed: give only runs or only exported folders. Folders are on the GPU, runs are not.", "REMOE-E501"
        )
    data = read_text(args, next(iter(opened.values())), args.data_path[0])
    batches = read_batches(data, PROMPTS, models[0].config.vocab_size)
    prompts = torch.cat(list(batches))[:, : max(1, data.config.sequence_length // 2)]
    length = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}

    def seconds(work: Callable[..., object], **settings: object) -> float:
        ids = prompts.to(models[0].device)
        wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        work(ids, **settings)
        wait()
        return time.perf_counter() - started

    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(ROUNDS + 1):
        for model, of_model in zip(models, times, strict=True):
            reading = seconds(model, logits_to_keep=1, use_cache=True)
            whole = seconds(model.generate, attention_mask=torch.ones_like(prompts).to(model.device), **length)
            of_model.append((reading, whole - reading))
    medians = [[statistics.median(part) for part in zip(*of_model[1:], strict=True)] for of_model in times]  # warm
    tokens = prompts.numel(), len(prompts) * (NEW_TOKENS - 1)
    return {
        name: {"prefill": tokens[0] / reading, "decode": tokens[1] / writing}
        for name, (reading, writing) in zip(opened, medians, strict=True)
    }
