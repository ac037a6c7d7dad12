"""Provide batches, loss and data sets of a GPT model to Megatron's training loop."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.remoe.start.data import count_evaluations
from megatron.training import get_args, get_timers, get_tokenizer, print_rank_0
from megatron.training.training import stimer  # the timer of --log-straggler; a new one would reset it
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
SPIKE = 10.0  # a loss this many times the largest one so far is a spike, as in Megatron's pretrain_gpt.py


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None) -> tuple[Any, ...]:
    """Return the next micro-batch on this rank.

    Returns:
        tokens, labels, loss_mask, attention_mask, position_ids: `[micro_batch, s]` with s = sequence / context parallel
        size. loss_mask is fp32; attention_mask is bool `[micro_batch, 1, s, sequence]`, True where masked; the others
        are int64. Each is None if this stage does not need it.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return (None,) * len(BATCH_KEYS)
    args = get_args()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        data = next(data_iterator)
        batch = {key: data[key].cuda(non_blocking=True) if key in data else None for key in BATCH_KEYS}
    is_last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size if torch.is_grad_enabled() else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=bool(args.mtp_num_layers) and is_last,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        is_pipeline_last_stage=is_last,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return tuple(batch[key] for key in BATCH_KEYS)


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum the losses of the tokens on this rank.

    Args:
        loss_mask: `[micro_batch, sequence]`, 1 for tokens that count.
        losses: `[micro_batch, sequence]`, cross entropy in nats.

    Returns:
        The summed loss, the number of its tokens (int32), and both in one tensor `[2]` for Megatron's "lm loss".
    """
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for is_rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            message = f"found {name} in local forward loss calculation"
            machine.validate_result(loss, is_rejected, message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        is_spiky = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        machine.validate_result(loss, is_spiky, "Spiky loss", tolerance=0.0, fatal=False)
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """Run the forward pass of a micro-batch. Return the output (or the schedule plan) and its loss function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    tokens, labels, loss_mask, attention_mask, position_ids = batch
    run = model.build_schedule_plan if return_schedule_plan else model
    with stimer:
        output = run(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def dataset_config() -> GPTDatasetConfig:
    """Build Megatron's data set configuration from its global arguments."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    path = args.per_dataset_sequences_path
    names = {field.name for field in fields(GPTDatasetConfig)} - {"data_parallel_size", "hybrid_context_parallel"}
    given = {name: value for name, value in vars(args).items() if name in names}
    given |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": None if path is None else json.loads(Path(path).read_text()),
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
    }
    return GPTDatasetConfig(**given)


def plan_training(args: argparse.Namespace) -> int:
    """Set `args.train_iters` for --train-samples. Return the number of sequences that the run will have read.

    Megatron assumes that the steps before a resume had this run's batch size. With --step-batch-size-schedule, it
    forgets the end of the last step.
    """
    end, steps = args.consumed_train_samples, args.iteration
    if args.step_batch_size_schedule:
        while end < args.train_samples:
            update_num_microbatches(end, consistency_check=False)
            end, steps = end + get_current_global_batch_size(), steps + 1
        update_num_microbatches(args.consumed_train_samples, consistency_check=False)
        args.train_iters = steps
        return end
    if args.train_samples:
        args.train_iters = steps + max(args.train_samples - end, 0) // args.global_batch_size
    return int(end + (args.train_iters - steps) * args.global_batch_size)


def train_valid_test_datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the training, validation and test sets; None for a set without sequences.

    Sets `args.consumed_valid_samples` to those of an uninterrupted run with these settings.

    Args:
        num_samples: number of sequences of each set.
        vp_stage: virtual pipeline stage.
    """
    args = get_args()
    if not (args.skip_train or args.phase_transition_iterations):  # a phase has its own number
        num_samples = [max(num_samples[0], plan_training(args)), *num_samples[1:]]
    if not args.full_validation:
        # Megatron counts one too few with --start-eval-at-iter, and earlier evaluations may have had other settings.
        ends = (0, 0) if args.skip_train else (args.iteration, args.train_iters)
        done, planned = (count_evaluations(args, end) * num_samples[2] for end in ends)
        args.consumed_valid_samples = done
        num_samples = [num_samples[0], planned + num_samples[2], num_samples[2]]
    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets ...")
    builds = is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0
    data_sets = BlendedMegatronDatasetBuilder(dataset_class, num_samples, lambda: builds, dataset_config()).build()
    # Megatron's loader fails on a blend without sequences, for example with --eval-iters 0.
    return [None if wanted == 0 else data_set for wanted, data_set in zip(num_samples, data_sets, strict=True)]


# Build the sets on every rank that needs them instead of on rank 0 only.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
