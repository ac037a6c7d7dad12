"""Write the text of an estimate: layout, compute, checkpoints, memory, tokens sent and hours."""

import argparse
import math
from collections.abc import Iterator

from ..recipes import flops
from . import memory
from .gpus import GPUS, format_duration, judge_memory
from .parameters import Stage
from .phases import TITLES, experts_by_phase


def _layout_lines(args: argparse.Namespace, options: argparse.Namespace) -> Iterator[str]:
    names = ("tensor_model", "pipeline_model", "context", "data", "expert_model")
    sizes = (f"{name.removesuffix('_model')} {getattr(args, f'{name}_parallel_size')}" for name in names)
    gpu = GPUS[options.gpu]
    yield f"Estimate for {options.gpus} x {options.gpu} ({gpu.memory:g} GiB, {gpu.tflops:g} TFLOP/s dense bf16)"
    yield f"  parallel sizes  {', '.join(sizes)}"
    yield f"  layers          {args.transformer_impl} (--transformer-impl)"
    if args.num_experts and args.expert_model_parallel_size > 1:
        ranks = args.expert_model_parallel_size * args.expert_tensor_parallel_size
        if options.gpus_per_node % ranks:
            yield f"  WARNING: expert-parallel groups of {ranks} GPUs do not fit in nodes of {options.gpus_per_node}."
            yield "  All-to-all crosses the network. Reduce EP or --expert-tensor-parallel-size."
    if args.fp8 or args.fp4:
        yield "  number format   FP8 and FP4 count as bf16"


def write_lines(
    args: argparse.Namespace, options: argparse.Namespace, stages: list[Stage], total: int, experts: int
) -> Iterator[str]:
    """Yield the lines of an estimate.

    Args:
        args: Megatron's validated arguments for `options.gpus` processes.
        options: the options of `remoe cost`.
        stages: from `parameters.count_stages`.
        total, experts: numbers of parameters from `parameters.count_whole_model`.
    """
    sequences = args.train_samples or args.train_iters * args.global_batch_size
    yield from _layout_lines(args, options)
    yield ""
    yield from _compute_lines(args, sequences, total, experts)
    if args.save and args.save_interval:
        interval = args.save_retain_interval or args.save_interval
        # Megatron always saves a checkpoint after the last iteration.
        number = math.ceil(sequences / args.global_batch_size / interval)
        size = memory.checkpoint_bytes(args, total) / 1e9
        yield ""
        yield (
            f"Checkpoints: {number} of {size:,.1f} GB, {number * size:,.1f} GB in all, one every {interval} "
            "iterations; --save-retain-interval N keeps fewer"
        )
    yield ""
    fullest = {}
    for phase, active in experts_by_phase(args).items():
        memories = (memory.stage_memory(args, stages, index, active) for index in range(len(stages)))
        fullest[phase] = max(memories, key=sum)
    yield from _memory_lines(args, stages, fullest)
    yield ""
    *advice, verdict = judge_memory(max(map(sum, fullest.values())) / 2**30, GPUS[options.gpu])
    yield from advice
    yield "Hours are without the dense start, evaluations and saves. For a model of the step's time: remoe rehearse, or"
    yield "  REHEARSE=1"
    low, high = options.mfu
    seconds = sequences * flops.flops_per_sequence(args) / (options.gpus * GPUS[options.gpu].tflops * 1e12)  # at 100 %
    least, most = (format_duration(100 * seconds / share) for share in (high, low))
    yield f"{verdict}; {least} to {most} at {high:g} to {low:g} % of the peak (--mfu)"


def _compute_lines(args: argparse.Namespace, sequences: int, total: int, experts: int) -> Iterator[str]:
    yield "Model and compute"
    yield f"  total parameters    {total:,}"
    used = experts * args.moe_router_topk // args.num_experts if args.num_experts else 0
    yield f"  active parameters   {total - experts + used:,} per token"
    per_sequence = flops.flops_per_sequence(args)
    yield f"  FLOPs               {per_sequence / args.seq_length / 1e9:.3f} G per token"
    yield f"                      {per_sequence / 1e9:,.0f} G per sequence of {args.seq_length} tokens"
    whole = f"{sequences * per_sequence:.3g} for the whole run of {sequences * args.seq_length:,} tokens"
    yield f"                      {whole}"
    if (dense := experts_by_phase(args).get("dense")) is not None:
        ratio = flops.flops_per_sequence(args, dense) / per_sequence
        yield f"  FLOPs count k experts per token; a step of the {TITLES['dense']} takes {ratio:.2f} times as many."
    yield from (f"  {line}" for line in flops.CONVENTION)


def _memory_lines(args: argparse.Namespace, stages: list[Stage], fullest: dict[str, memory.Memory]) -> Iterator[str]:
    phases = experts_by_phase(args)
    titles = [TITLES[phase] if len(phases) > 1 else "all steps" for phase in phases]
    yield f"{'Memory of a GPU, GiB':<24}" + "".join(f"{title:>15}" for title in titles)
    if args.num_experts:
        yield f"{f'  experts, of {args.num_experts}':<24}" + "".join(f"{n:15g}" for n in phases.values())
    rows = {name: [getattr(column, name) for column in fullest.values()] for name in memory.Memory._fields}
    for name, row in (rows | {"total": [*map(sum, fullest.values())]}).items():
        yield f"  {name:<22}" + "".join(f"{amount / 2**30:15.2f}" for amount in row)
    if len(stages) > 1:
        yield f"  in the fullest of {len(stages)} pipeline stages"
    yield f"  without {memory.NOT_COUNTED[0]}"
    yield f"  {memory.NOT_COUNTED[1]}"
    if args.num_experts and args.expert_model_parallel_size > 1:
        sent = [memory.exchanged_bytes(args, stages, experts) for experts in phases.values()]
        yield f"{'Tokens sent, GB a step':<24}" + "".join(f"{amount / 1e9:15.2f}" for amount in sent)
