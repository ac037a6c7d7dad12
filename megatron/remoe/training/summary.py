"""Print one line before the first step: the model, the devices, and the amount of data."""

import argparse
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from megatron.core import mpu
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.remoe.patches.log_lines import run_logger
from megatron.training import print_rank_0
from megatron.training.models.base import ModelConfig

UNITS = ((10**12, " T"), (10**9, " B"), (10**6, " M"))


def with_summary(args: argparse.Namespace, model_cfg: ModelConfig, provider: Callable[..., Any]) -> Callable[..., Any]:
    """Return `provider`, extended to print the line on the first rank after it has built the data sets.

    The number of parameters also goes to the run's log.

    Args:
        args: Megatron's arguments, validated.
        model_cfg: the configuration that the model will be built from.
        provider: of the data sets, as Megatron calls it. Epochs are left out if a set is not of Megatron's classes.
    """
    parameters: list[int] = []

    def count(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        parameters.append(count_parameters(model_chunks))
        run_logger().info({"parameters": parameters[0]})
        return model_chunks

    @wraps(provider)
    def summarizing(num_samples: list[int], *others: Any, **options: Any) -> Any:
        data_sets = provider(num_samples, *others, **options)
        if parameters and not args.skip_train and args.iteration < args.train_iters:
            tokens = num_samples[0] * args.seq_length
            of_a_step = (
                "" if args.step_batch_size_schedule else f" of {args.global_batch_size * args.seq_length:,} tokens"
            )
            print_rank_0(
                f"Training: {_model(args)}, {short(parameters.pop())} parameters, on {_devices(args)}. Steps "
                f"{args.iteration + 1:,} to {args.train_iters:,}{of_a_step}, {short(tokens)} tokens in all"
                f"{_epochs(data_sets[0], tokens)}. "
                "Each line of the log has the time left."
            )
        return data_sets

    model_cfg.post_wrap_hooks.append(count)
    return summarizing


def _model(args: argparse.Namespace) -> str:
    if args.moe_baseline_router:
        return f"MoE with {args.moe_baseline_router} routing"
    return "ReMoE" if args.moe_relu_routing else "top-k MoE" if args.num_experts else "dense model"


def _devices(args: argparse.Namespace) -> str:
    name = torch.cuda.get_device_name()
    if name == "cpu":
        return "1 CPU process" if args.world_size == 1 else f"{args.world_size} CPU processes"
    return f"{args.world_size} x {name}"


def short(number: int) -> str:
    """Return a number with three digits and its unit, as in 1.23 B."""
    unit, letter = next(((unit, letter) for unit, letter in UNITS if number >= unit), (1, ""))
    return f"{number / unit:,.3g}{letter}" if letter else f"{number:,}"


def count_parameters(model_chunks: Iterable[torch.nn.Module]) -> int:
    """Count the model's parameters, each once even if several ranks hold it. Call it on every rank.

    Args:
        model_chunks: the model on this rank, all its virtual pipeline stages.
    """
    counted = 0
    for name, parameter in (named for chunk in model_chunks for named in chunk.named_parameters()):
        if ".experts." in name:
            replica, tensor_rank = mpu.get_expert_data_parallel_rank(), mpu.get_expert_tensor_parallel_rank()
        else:
            replica = mpu.get_data_parallel_rank(with_context_parallel=True)
            tensor_rank = mpu.get_tensor_model_parallel_rank()
        # A parameter of Megatron-FSDP has the size of all tensor parallel ranks' parts.
        is_split = getattr(parameter, "tensor_model_parallel", False) and not isinstance(parameter, DTensor)
        # The last pipeline stage has a copy of tied embeddings.
        if replica == 0 and (is_split or tensor_rank == 0) and not getattr(parameter, "shared", False):
            counted += parameter.numel()
    total = torch.tensor(counted, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total)


def _epochs(train_set: Any, tokens: int) -> str:
    """Return the number of epochs; for a blend, the smallest and the largest of its sets."""
    sets, weights = getattr(train_set, "datasets", [train_set]), getattr(train_set, "weights", None) or [1.0]
    if not all(isinstance(data_set, GPTDataset) and not isinstance(data_set, MockGPTDataset) for data_set in sets):
        return ""
    sizes = [data_set._get_num_tokens_per_epoch() for data_set in sets]
    passes = [tokens * weight / sum(weights) / size for weight, size in zip(weights, sizes, strict=True)]
    least, most = f"{min(passes):.2g}", f"{max(passes):.2g}"
    return f", {least if least == most else f'{least} to {most}'} epochs of the data"
