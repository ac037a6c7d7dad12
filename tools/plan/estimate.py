"""Write the text of an estimate: model, data, checkpoints, memory and time."""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from megatron.core.datasets.utils import get_blend_from_list
from megatron.remoe.files.errors import DataError
from megatron.remoe.files.indexed import IndexedReader

from ..recipes import flops
from . import memory
from .gpus import GPUS
from .parameters import Stage
from .phases import TITLES, experts_by_phase
from .step_estimate import estimate_step
from .step_time import conclude

BOUND, MANY = 4, 32  # docs/experiments.md recommends at most BOUND · k experts per token from MANY · k experts on
LAYERS = {"local": "plain PyTorch", "transformer_engine": "Transformer Engine"}


def write_layout(args: argparse.Namespace, options: argparse.Namespace) -> Iterator[str]:
    """Yield machine and layout."""
    names = ["tensor_model", "pipeline_model", "context", "data"]
    if args.num_experts:
        names.append("expert_model")
    sizes = (f"{name.removesuffix('_model')} {getattr(args, f'{name}_parallel_size')}" for name in names)
    gpu = GPUS[options.gpu]
    yield f"Plan: {options.gpus} x {options.gpu} ({gpu.memory:g} GiB, {gpu.tflops:g} TFLOP/s dense bf16)"
    yield f"  parallel sizes  {', '.join(sizes)}"
    yield f"  layers          {LAYERS.get(args.transformer_impl, args.transformer_impl)} (--transformer-impl)"
    if args.num_experts and args.expert_model_parallel_size > 1:
        ranks = args.expert_model_parallel_size * args.expert_tensor_parallel_size
        if options.gpus_per_node % ranks:
            yield f"  WARNING: expert-parallel groups of {ranks} GPUs do not fit in nodes of {options.gpus_per_node}."
            yield "  All-to-all crosses the network. Reduce EP or --expert-tensor-parallel-size."
    if args.fp8 or args.fp4:
        yield "  number format   FP8 and FP4 count as bf16, in memory and in time"


def write_lines(
    args: argparse.Namespace, options: argparse.Namespace, stages: list[Stage], total: int, experts: int
) -> Iterator[str]:
    """Yield compute, data, checkpoints, memory and time.

    Args:
        args: Megatron's validated arguments for `options.gpus` processes.
        options: the command's own flags.
        stages: see `parameters.count_stages`.
        total, experts: see `parameters.count_whole_model`.
    """
    sequences = args.train_samples or args.train_iters * args.global_batch_size
    yield ""
    yield from _compute_lines(args, sequences, total, experts)
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
    columns = _memory_columns(args, stages)
    yield from _memory_lines(args, stages, columns)
    needed = max(sum(column) for _, column in columns.values()) / 2**30
    time = estimate_step(args, stages, options.rates, options.gpus_per_node)
    yield ""
    yield from conclude(time, sequences / args.global_batch_size, needed, GPUS[options.gpu].memory, options.gpu)


def _compute_lines(args: argparse.Namespace, sequences: int, total: int, experts: int) -> Iterator[str]:
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
    yield f"  FLOPs               {per_sequence / args.seq_length / 1e9:.3f} G per token"
    yield f"                      {per_sequence / 1e9:,.0f} G per sequence of {args.seq_length} tokens"
    whole = f"{sequences * per_sequence:.3g} for the whole run of {sequences * args.seq_length:,} tokens"
    yield f"                      {whole}"
    if (dense := experts_by_phase(args).get("dense")) is not None:
        ratio = flops.flops_per_sequence(args, dense) / per_sequence
        yield f"  FLOPs count k experts per token; a step of the {TITLES['dense']} takes {ratio:.2f} times as many."
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


def _memory_columns(args: argparse.Namespace, stages: list[Stage]) -> dict[str, tuple[int, memory.Memory]]:
    """Return the fullest pipeline stage's number, and its memory, by title of the phase."""
    columns, phases = {}, experts_by_phase(args)
    for phase, experts in phases.items():
        memories = [memory.stage_memory(args, stages, index, experts) for index in range(len(stages))]
        fullest = max(range(len(stages)), key=lambda index: sum(memories[index]))
        title = TITLES[phase] if len(phases) > 1 else "all steps"
        title += f", {experts:g} of {args.num_experts} experts" if args.num_experts else ""
        columns[title] = fullest + 1, memories[fullest]
    return columns


def _memory_lines(
    args: argparse.Namespace, stages: list[Stage], columns: dict[str, tuple[int, memory.Memory]]
) -> Iterator[str]:
    yield "Memory of a GPU, GiB  " + "".join(f"  {title:>34}" for title in columns)
    rows = {name: [getattr(column, name) for _, column in columns.values()] for name in memory.Memory._fields}
    for name, row in (rows | {"total": [sum(column) for _, column in columns.values()]}).items():
        yield f"  {name:<20}" + "".join(f"{amount / 2**30:36.2f}" for amount in row)
    if len(stages) > 1:
        places = ", ".join(map(str, sorted({place for place, _ in columns.values()})))
        yield f"  in the fullest of {len(stages)} pipeline stages ({places})"
    yield f"  without {memory.NOT_COUNTED}"
    if args.num_experts and args.expert_model_parallel_size > 1:
        sent = [memory.exchanged_bytes(args, stages, experts) for experts in experts_by_phase(args).values()]
        yield "All-to-all, GB a step " + "".join(f"{amount / 1e9:36.2f}" for amount in sent)
