"""Estimate a step's work from Megatron's arguments, for the model of time in step_time.py."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches

from ..recipes.flops import flops_per_sequence
from . import memory
from .memory import element_size, tokens_per_gpu
from .parameters import Stage
from .step_time import StepTime, attention_share, collective_seconds, grouped_share, host_seconds, waiting_seconds

CAUSAL = 7 / 12  # share of the attention FLOPs of recipes.flops: half forward, 5/8 backward
FORWARD = {"products": 1 / 3, "grouped": 1 / 3, "attention": 2 / 7}  # share of a step's FLOPs; attention as in CAUSAL
BUCKET = 40e6  # elements of a gradient bucket in Megatron, or 1e6 for each data parallel rank if that is more


@dataclass(frozen=True)
class Overhead:
    """Work other than products, fitted to rehearsals of the paper's models.

    Attributes:
        passes: bytes that a step moves, relative to the activations that layers keep.
        logit: bytes that the loss moves, relative to the number of logits.
        gradient: bytes that optimizer, norm and buffers move, relative to the gradients' bytes.
        calls, launches: calls of Python functions, and launches on the GPU, per layer and micro-batch.
    """

    passes: float
    logit: float
    gradient: float
    calls: float
    launches: float


TORCH, TRITON = Overhead(13.6, 69.0, 5.4, 870, 197), Overhead(7.1, 6.6, 3.4, 1260, 122)


def bubble(args: argparse.Namespace) -> float:
    """Return the pipeline's slowdown (m v + p - 1) / (m v): m micro-batches, v virtual stages per rank, p ranks."""
    steps = get_num_microbatches() * (args.virtual_pipeline_model_parallel_size or 1)
    return (steps + args.pipeline_model_parallel_size - 1) / steps


def estimate_step(
    args: argparse.Namespace, stages: list[Stage], rates: dict[str, float], gpus_per_node: int
) -> StepTime:
    """Estimate a step at the target sparsity, without a rehearsal.

    Args:
        args: Megatron's validated arguments.
        stages: from `parameters.count_stages`.
        rates: from `gpus.rates`.
        gpus_per_node: number of GPUs with fast links to each other.
    """
    experts = args.moe_router_topk if args.num_experts else 0
    groups = [group for stage in stages for group in memory.group_activations(args, stage.layers, experts)]
    parts = _products(args, "".join(group.again for group in groups))
    shares = {"grouped": grouped_share(args) if args.num_experts else 1.0, "attention": attention_share(args)}
    products = sum(amount / (shares.get(kind, 1.0) * rates[kind] * 1e12) for kind, amount in parts.items())
    overhead = TRITON if args.moe_kernels == "triton" else TORCH
    micro_batches = get_num_microbatches()
    layers = [layer for stage in stages for layer in stage.layers]
    kept_bytes = sum(group.kept + 4 / 3 * group.recomputed for group in groups) / len(stages)
    logits = args.padded_vocab_size * tokens_per_gpu(args) / args.tensor_model_parallel_size
    # `parts` are means over the stages. The last stage has the output layer, so it is the slowest.
    products += 6e-12 * micro_batches * args.hidden_size * logits * (1 - 1 / len(stages)) / rates["products"]
    gradients = memory.gradient_size(args) * sum(stage.shared + stage.experts for stage in stages)
    moved = micro_batches * (overhead.passes * kept_bytes + overhead.logit * logits)
    traffic = (moved + overhead.gradient * gradients / len(stages)) / (rates["bandwidth"] * 1e12)
    launched = micro_batches * len("".join(layers)) / 2 / len(stages)  # a layer has two sublayers
    host = host_seconds(overhead.calls * launched, overhead.launches * launched, rates)
    waiting = waiting_seconds(host, products + traffic)
    seconds = {True: 0.0, False: 0.0}  # of collectives within a node, and between nodes
    for call in estimate_collectives(args, stages, gpus_per_node):
        seconds[call["within_node"]] += collective_seconds(call, rates)
    return StepTime(products, traffic, waiting, seconds[True], seconds[False], bubble(args))


def _products(args: argparse.Namespace, recomputed: str = "") -> dict[str, float]:
    """Return rate → FLOPs that a GPU computes at it in a step; `recomputed` sublayers have a second forward pass."""
    sequences = args.global_batch_size / args.world_size
    flops = sequences * flops_per_sequence(args)
    longer = flops_per_sequence(argparse.Namespace(**vars(args) | {"seq_length": 2 * args.seq_length}))
    attention = sequences * longer / 2 - flops  # grows with the square of the length
    topk = args.moe_router_topk if args.num_experts else 0
    grouped = topk * (sequences * flops_per_sequence(args, topk + 1) - flops)
    parts = {"products": flops - attention - grouped, "grouped": grouped, "attention": CAUSAL * attention}
    if recomputed:
        changes = {"hybrid_layer_pattern": recomputed, "padded_vocab_size": 0}  # without the output layer
        again = _products(argparse.Namespace(**vars(args) | changes))
        parts = {kind: amount + FORWARD[kind] * again[kind] for kind, amount in parts.items()}
    return parts


def estimate_collectives(args: argparse.Namespace, stages: list[Stage], gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """Yield a GPU's collectives in a step for `collective_seconds`, without context and pipeline parallelism's."""
    tp, pp, size = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, element_size(args)
    per_stage, micro_batches = args.world_size // pp, get_num_microbatches()
    hidden = args.hidden_size * tokens_per_gpu(args) * size  # bytes of the hidden states of a micro-batch
    expert_tp = args.expert_tensor_parallel_size if args.num_experts else 1
    expert_ranks = expert_tp * args.expert_model_parallel_size

    def call(kind: str, ranks: int, span: int, times: float, amount: float) -> Iterator[dict[str, Any]]:
        if ranks > 1 and amount:
            within = span <= gpus_per_node
            yield {"kind": kind, "ranks": ranks, "within_node": within, "times": times, "bytes": amount}

    bucket = args.ddp_bucket_size or max(BUCKET, 1e6 * args.data_parallel_size)
    gradient = memory.gradient_size(args)
    for name, ranks in (("shared", per_stage // tp), ("experts", per_stage // expert_ranks)):
        mean = sum(getattr(stage, name) for stage in stages) / len(stages)  # parameters of a stage
        buckets = math.ceil(mean / bucket) if args.overlap_grad_reduce else 1
        if memory.shards_optimizer(args):
            yield from call("reduce_scatter_tensor", ranks, per_stage, buckets, gradient * mean)
            yield from call("all_gather_into_tensor", ranks, per_stage, buckets, size * mean)
        else:
            yield from call("all_reduce", ranks, per_stage, buckets, gradient * mean)
    sublayers = [part for stage in stages for layer in stage.layers for part in layer]
    split = sum(part in "*-" for part in sublayers) / len(stages) * micro_batches
    # With sequence parallelism: two gathers or scatters forward, three backward. Without: one sum in each pass.
    kind, times = ("all_gather_into_tensor", 5) if args.sequence_parallel else ("all_reduce", 2)
    yield from call(kind, tp, tp, times * split, times * split * hidden)
    with_experts = sublayers.count("E") / len(stages) * micro_batches
    if with_experts:
        sent = memory.exchanged_bytes(args, stages, args.moe_router_topk)
        ep = args.expert_model_parallel_size
        if ep > 1:
            yield from call("all_to_all_single", ep, expert_ranks, 4 * with_experts, sent * ep / (ep - 1))
        pairs = args.moe_router_topk * hidden * expert_tp / (tp if args.sequence_parallel else 1)
        yield from call("all_gather_into_tensor", expert_tp, expert_tp, 4 * with_experts, 4 * with_experts * pairs)
