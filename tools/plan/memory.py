"""Estimate the memory of one GPU: weights, gradients, optimizer and activations of a pipeline stage."""

import argparse
from typing import NamedTuple

import torch

from megatron.core.num_microbatches_calculator import get_num_microbatches

from .activations import element_size, layer_activations, recomputed_modules, tokens_per_gpu
from .parameters import Stage

NOT_COUNTED = "the CUDA context, NCCL's buffers, temporary tensors and fragmentation, together some GiB"


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float


def stage_memory(args: argparse.Namespace, stages: list[Stage], index: int, experts_per_token: float) -> Memory:
    """Return the memory of a GPU of stage `index` with an even load of experts.

    `experts_per_token` are the active ones in each MoE layer.
    """
    stage, parameters = stages[index], stages[index].shared + stages[index].experts
    half = args.bf16 or args.fp16
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    per_stage = args.world_size // args.pipeline_model_parallel_size // args.num_distributed_optimizer_instances
    shared_copies = per_stage // args.tensor_model_parallel_size  # context parallel ranks share the optimizer too
    expert_copies = per_stage // (args.expert_tensor_parallel_size * args.expert_model_parallel_size)
    part = stage.shared / shared_copies + stage.experts / expert_copies
    return Memory(
        weights=element_size(args) * parameters,
        gradients=gradient * parameters,
        optimizer=_optimizer_bytes(args, half) * (part if args.use_distributed_optimizer else parameters),
        activations=_activations(args, stages, index, experts_per_token),
    )


def checkpoint_bytes(args: argparse.Namespace, parameters: int) -> float:
    """Return the bytes of one checkpoint on disk: weights and optimizer state of a model of so many parameters."""
    optimizer = 0 if args.no_save_optim else _optimizer_bytes(args, args.bf16 or args.fp16)
    return (element_size(args) + optimizer) * parameters


def exchanged_bytes(args: argparse.Namespace, stages: list[Stage], experts_per_token: float) -> float:
    """Return the bytes that a GPU sends to others in a step's all-to-all exchanges of tokens.

    Each pair's vector travels there and back, and so does its gradient; recomputation sends the vectors again.
    `experts_per_token` are those computed in each MoE layer.
    """
    layers = sum("E" in layer for stage in stages for layer in stage.layers)
    tokens = args.global_batch_size * args.seq_length / args.world_size
    limit = args.moe_relu_activation_limit * args.moe_router_topk if args.moe_relu_routing else 0.0
    in_chunks = 0 < limit < experts_per_token
    recomputed = in_chunks or args.recompute_granularity == "full" or "moe" in recomputed_modules(args)
    vectors = layers * tokens * experts_per_token * (1 - 1 / args.expert_model_parallel_size)
    return (6 if recomputed else 4) * vectors * args.hidden_size * element_size(args)


def _optimizer_bytes(args: argparse.Namespace, half: bool) -> int:
    """Return bytes per parameter: Adam's two moments, and the fp32 weights of half-precision training."""
    if args.optimizer == "sgd":
        return 4 * half + 4
    if not args.use_precision_aware_optimizer:
        return 4 * half + 8
    kinds: list[torch.dtype] = [args.exp_avg_dtype, args.exp_avg_sq_dtype]
    if half:
        kinds.append(args.main_params_dtype)
    return sum(kind.itemsize for kind in kinds)


def _activations(args: argparse.Namespace, stages: list[Stage], index: int, experts_per_token: float) -> float:
    layers = [layer_activations(args, sublayers, experts_per_token) for sublayers in stages[index].layers]
    total = sum(layer.kept for layer in layers) * _micro_batches_in_flight(args, index)
    total += max((layer.recomputed for layer in layers), default=0.0)
    if index == len(stages) - 1:
        tokens, tensor_parallel = tokens_per_gpu(args), args.tensor_model_parallel_size
        split = tokens / tensor_parallel if args.sequence_parallel else tokens
        size, predictions = element_size(args), args.mtp_num_layers or 0
        # Before and after the last norm. Multi-token prediction keeps its embeddings, these with the hidden state, two
        # more norms' inputs, and all outputs again in one tensor.
        total += (2 + 6 * predictions) * args.hidden_size * split * size
        softmax = size if args.cross_entropy_loss_fusion else 4  # fused, the logits' gradient in their place
        of_logit = softmax * (1 + predictions) + size * (softmax > size)
        total += of_logit * args.padded_vocab_size * tokens / tensor_parallel
    return total


def _micro_batches_in_flight(args: argparse.Namespace, index: int) -> float:
    """Return how many micro-batches' activations the stage holds at once.

    Those of the warm-up and one more: `get_pp_rank_microbatches` in Megatron's schedules.
    """
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return 1
    warm_up = stages - index - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * (args.microbatch_group_size_per_vp_stage or stages)
        warm_up += args.overlap_moe_expert_parallel_comm
    return min(warm_up + 1, get_num_microbatches() * chunks) / chunks
