"""Measure how fast a model reads and writes on this machine."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.remoe.hf import RemoeForCausalLM

from ..common.errors import ConversionError

ROUNDS = 5
NEW_TOKENS = 32


@dataclass(frozen=True)
class Speed:
    """Tokens per second over all texts of a batch, medians of the rounds."""

    prefill: float
    decode: float


@torch.inference_mode()
def speeds(models: Sequence[RemoeForCausalLM], prompts: torch.Tensor) -> list[Speed]:
    """Time the models in turns, so that other work on the machine slows all of them.

    Args:
        models: on the same device.
        prompts: int64 `[batch, length]`, read at once, and continued by `NEW_TOKENS`.

    Raises:
        ConversionError: they are on different devices.
    """
    if len({model.device for model in models}) > 1:
        raise ConversionError(
            "--speed: give only runs or only exported folders. Folders are on the GPU, runs are not.", "REMOE-E501"
        )
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for number in range(ROUNDS + 1):
        for model, (reading, writing) in zip(models, times, strict=True):
            ids = prompts.to(model.device)
            first = _seconds(lambda: model(ids, logits_to_keep=1, use_cache=True), model)  # noqa: B023
            whole = _seconds(lambda: _write(model, ids), model)  # noqa: B023
            if number:  # the first round warms up
                reading.append(first)
                writing.append(whole - first)
    return [
        Speed(
            prompts.numel() / statistics.median(reading), len(prompts) * (NEW_TOKENS - 1) / statistics.median(writing)
        )
        for reading, writing in times
    ]


def _write(model: RemoeForCausalLM, ids: torch.Tensor) -> None:
    settings = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def _seconds(work: Callable[[], object], model: RemoeForCausalLM) -> float:
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
