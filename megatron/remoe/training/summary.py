"""Print one line before the first step: the model, the devices, and the number of tokens."""

import argparse
from collections.abc import Iterable

import torch

from megatron.core import mpu
from megatron.remoe.patches.log_lines import run_logger
from megatron.training import print_rank_0
from megatron.training.models.base import ModelConfig

UNITS = ((10**12, " T"), (10**9, " B"), (10**6, " M"))


def add_summary(args: argparse.Namespace, model_cfg: ModelConfig) -> None:
    """Print the line on the first rank when the model is built; the number of parameters also goes to the run's log.

    Args:
        args: Megatron's arguments, validated.
        model_cfg: the configuration that the model will be built from.
    """

    def summarize(model_chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        parameters, batch = count_parameters(model_chunks), args.global_batch_size
        run_logger().info({"parameters": parameters})
        if not args.skip_train:
            samples = args.train_samples or args.train_iters * batch
            device = torch.cuda.get_device_name().replace("cpu", "CPU process")
            steps = f"{samples // batch:,} steps of {batch * args.seq_length:,} tokens, "
            print_rank_0(
                f"Training: {_model(args)}, {short(parameters)} parameters, on {args.world_size} x {device}. "
                f"{'' if args.step_batch_size_schedule else steps}{short(samples * args.seq_length)} tokens in all."
            )
        return model_chunks

    model_cfg.post_wrap_hooks.append(summarize)


def _model(args: argparse.Namespace) -> str:
    if args.moe_baseline_router:
        return f"MoE with {args.moe_baseline_router} routing"
    if args.moe_relu_routing:
        return "ReMoE"
    return "top-k MoE" if args.num_experts else "dense model"


def short(number: int) -> str:
    """Return a number with three digits and a unit, as in 1.23 B; below a million, return it in full."""
    unit, letter = next(((unit, letter) for unit, letter in UNITS if number >= unit), (1, ""))
    return f"{float(f'{number / unit:.3g}'):,g}{letter}" if letter else f"{number:,}"


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
        is_split = getattr(parameter, "tensor_model_parallel", False)
        # The last pipeline stage has a copy of tied embeddings.
        if replica == 0 and (is_split or tensor_rank == 0) and not getattr(parameter, "shared", False):
            counted += parameter.numel()
    total = torch.tensor(counted, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return int(total)
