"""Measure how fast models read and write on this machine."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from megatron.remoe.hf import RemoeForCausalLM

from ..common.errors import ConversionError

ROUNDS = 5
NEW_TOKENS = 32


@torch.inference_mode()
def speeds(models: Sequence[RemoeForCausalLM], prompts: torch.Tensor) -> list[dict[str, float]]:
    """Time the models in turns, so that other work on the machine slows all of them.

    Args:
        models: on the same device.
        prompts: int64 `[batch, length]`, read at once, and continued by `NEW_TOKENS`.

    Returns:
        Tokens per second over the batch, medians of the rounds: of reading ("prefill") and of writing ("decode").

    Raises:
        ConversionError: the models are on different devices.
    """
    if len({model.device for model in models}) > 1:
        raise ConversionError(
            "--speed: give only runs or only exported folders. Folders are on the GPU, runs are not.", "REMOE-E501"
        )
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
    return [{"prefill": tokens[0] / reading, "decode": tokens[1] / writing} for reading, writing in medians]
