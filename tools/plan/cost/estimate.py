"""Print the estimate of a training's cost."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from megatron.core.datasets.utils import get_blend_from_list
from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedReader

from ...recipes import flops
from . import memory
from .parameters import Stage

BOUND, MANY = 4, 32  # docs/experiments.md recommends at most BOUND · k experts per token from MANY · k experts on
LAYERS = {"local": "plain PyTorch", "transformer_engine": "Transformer Engine"}


def phases(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Return titles of ReMoE's phases, and the experts that each computes per token. Other models have one phase.

    The phases are the dense start with half of the experts, the moment when layers stop using chunks, and the rest.
    """
    topk = args.moe_router_topk if args.num_experts else 0
    if not args.moe_relu_routing:
        return [("all steps", topk)]
    dense = min(args.num_experts / 2, args.moe_relu_max_experts or args.num_experts)
    limit = args.moe_relu_activation_limit * topk
    on_the_way = [("on the way", limit)] if topk < limit < dense else []
    return [("dense first stage", dense), *on_the_way, ("steady stage", topk)]


def plan_lines(args: argparse.Namespace, options: argparse.Namespace) -> Iterator[str]:
    """Yield machine and layout."""
    names = ["tensor_model", "pipeline_model", "context", "data"]
    if args.num_experts:
        names.append("expert_model")
    sizes = (f"{name.removesuffix('_model')} {getattr(args, f'{name}_parallel_size')}" for name in names)
    card = options.accelerator
    yield f"Plan: {options.gpus} x {options.gpu} ({card.memory:g} GiB, {card.tflops:g} TFLOP/s dense bf16)"
    yield f"  parallel sizes  {', '.join(sizes)}"
    yield f"  layers          {LAYERS.get(args.transformer_impl, args.transformer_impl)} (--transformer-impl)"
    if args.context_parallel_size > 1 and args.transformer_impl == "local":
        yield "  WARNING: context parallelism needs --transformer-impl transformer_engine."
    ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
    if args.num_experts and args.expert_model_parallel_size > 1 and options.gpus_per_node % ranks:
        yield f"  WARNING: expert-parallel groups of {ranks} GPUs do not fit in nodes of {options.gpus_per_node}."
        yield "  All-to-all crosses the network, and training can take several times as long as estimated. Reduce EP or"
        yield "  --expert-tensor-parallel-size, or rehearse the run with REHEARSE=1."
    if args.fp8 or args.fp4:
        yield "  number format   FP8 and FP4 count as bf16, in memory and in time"


def lines(
    args: argparse.Namespace, options: argparse.Namespace, stages: list[Stage], total: int, experts: int
) -> Iterator[str]:
    """Yield compute, data, checkpoints and memory, given validated arguments for `options.gpus` processes.

    See `parameters.stages` and `parameters.total`.
    """
    sequences = args.train_samples or args.train_iters * args.global_batch_size
    yield ""
    yield from _compute_lines(args, options, sequences, total, experts)
    yield from _data_lines(args, sequences)
    if args.save and args.save_interval:
        interval = args.save_retain_interval or args.save_interval
        # One is saved after the last iteration in any case.
        number = math.ceil(sequences / args.global_batch_size / interval)
        size = memory.checkpoint_bytes(args, total) / 1e9
        yield ""
        yield (
            f"Checkpoints: {number} of {size:,.1f} GB, {number * size:,.1f} GB in all, one every {interval} "
            "iterations; --save-retain-interval N keeps fewer"
        )
    yield ""
    yield from _memory_lines(args, options, stages)


def _compute_lines(
    args: argparse.Namespace, options: argparse.Namespace, sequences: int, total: int, experts: int
) -> Iterator[str]:
    yield "Model and compute"
    yield f"  total parameters    {total:,}"
    used = experts * args.moe_router_topk // args.num_experts if args.num_experts else 0
    yield f"  active parameters   {total - experts + used:,} per token"
    try:
        per_sequence = flops.flops_per_sequence(args)
    except ValueError as error:
        yield f"  FLOPs, time         not known: {error}"
        yield "                      The memory excludes other layers' activations."
        return
    rate = options.gpus * options.accelerator.tflops * 1e12 * options.utilization
    hours = sequences * per_sequence / rate / 3600
    duration = f"{hours:,.1f} hours" + (f" ({hours / 24:.1f} days)" if hours > 48 else "")
    duration = f"{hours * 60:.1f} minutes" if hours < 1 else duration
    yield f"  FLOPs               {per_sequence / args.seq_length / 1e9:.3f} G per token"
    yield f"                      {per_sequence / 1e9:,.0f} G per sequence of {args.seq_length} tokens"
    whole = f"{sequences * per_sequence:.3g} for the whole run of {sequences * args.seq_length:,} tokens"
    yield f"                      {whole}"
    gpus = f"{options.gpus} x {options.gpu} at {options.utilization:.0%} utilization"
    yield f"  time                at best {duration} on {gpus}; collectives are not counted"
    for title, experts_per_token in phases(args)[:-1][:1]:
        ratio = flops.flops_per_sequence(args, experts_per_token) / per_sequence
        yield f"  FLOPs count k experts per token; a step of the {title} takes {ratio:.2f} times as many."
        if args.moe_relu_max_experts is None and args.num_experts >= MANY * args.moe_router_topk:
            most = BOUND * args.moe_router_topk
            ratio = flops.flops_per_sequence(args, most) / per_sequence
            flag = f"--moe-relu-max-experts {most // args.moe_granularity}"
            yield f"  With {flag} it takes {ratio:.2f} times as many (docs/experiments.md)."
    yield from (f"  {line}" for line in flops.CONVENTION)


def _data_lines(args: argparse.Namespace, sequences: int) -> Iterator[str]:
    """Yield the number of epochs if the data exist; with weights it differs between data sets."""
    parts = [float(part) for part in (args.split or "1").split(",")]
    words, share = (args.train_data_path, 1.0) if args.train_data_path else (args.data_path, parts[0] / sum(parts))
    blend = get_blend_from_list(words)
    try:
        sizes = [share * IndexedReader(Path(prefix), thorough=False).tokens for prefix in blend[0]] if blend else []
    except (DataError, OSError):
        return
    if not blend or not all(sizes):
        return
    wanted, weights = sequences * args.seq_length, blend[1] or sizes
    epochs = [wanted * weight / sum(weights) / size for weight, size in zip(weights, sizes, strict=True)]
    least, most = f"{min(epochs):.3g}", f"{max(epochs):.3g}"
    number = least if least == most else f"{least} to {most}"
    yield ""
    yield (
        f"Data: {sum(sizes):,.0f} tokens to train on in {len(sizes)} data set{'s' * (len(sizes) > 1)}; {number} epochs"
    )


def _memory_lines(args: argparse.Namespace, options: argparse.Namespace, stages: list[Stage]) -> Iterator[str]:
    titles, places, columns = [], set(), []
    for title, experts_per_token in phases(args):
        memories = [memory.stage_memory(args, stages, index, experts_per_token) for index in range(len(stages))]
        stage, needed = max(enumerate(memories), key=lambda of_stage: sum(of_stage[1]))
        titles.append(title + (f", {experts_per_token:g} of {args.num_experts} experts" if args.num_experts else ""))
        places.add(stage + 1)
        columns.append(needed._asdict() | {"total": sum(needed)})
    yield "Memory of a GPU, GiB" + "".join(f"{title:>36}" for title in titles)
    for name in columns[0]:
        yield f"  {name:<18}" + "".join(f"{column[name] / 2**30:36.2f}" for column in columns)
    if len(stages) > 1:
        yield f"  in the fullest of {len(stages)} pipeline stages ({', '.join(map(str, sorted(places)))})"
    yield f"  without {memory.NOT_COUNTED}"
    if args.num_experts and args.expert_model_parallel_size > 1:
        sent = [memory.exchanged_bytes(args, stages, experts_per_token) for _, experts_per_token in phases(args)]
        yield "All-to-all, GB a step" + "".join(f"{one / 1e9:36.2f}" for one in sent)[1:]
    largest = max(column["total"] for column in columns) / 2**30
    if largest > options.accelerator.memory:
        yield f"  WARNING: {largest:.1f} GiB are more than a {options.gpu} has."
        yield "  Choose a smaller micro-batch, more expert, tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."
