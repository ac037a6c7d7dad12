"""The estimate of a training's cost, and how it is printed."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from . import compute, memory, paper, parameters
from .gpus import Accelerator


@dataclass(frozen=True)
class Plan:
    """Where a training would run.

    Attributes:
        gpus: their number.
        kind: name of the accelerator.
        accelerator: its figures.
        utilization: share of its rate that the model's FLOPs are assumed to reach.
        paper: size and routing of the paper's run to compare with, or None.
    """

    gpus: int
    kind: str
    accelerator: Accelerator
    utilization: float
    paper: tuple[str, str] | None


@dataclass(frozen=True)
class Phase:
    """A part of the training: how many experts a token has in it."""

    title: str
    experts_per_token: float


def phases(args: argparse.Namespace) -> list[Phase]:
    """Of ReMoE: the dense first stage, in which half of the experts are active; the moment on the way down at which the
    layers stop to work in chunks; the rest. Of the others: one phase."""
    topk = args.moe_router_topk if args.num_experts else 0
    if not args.moe_relu_routing:
        return [Phase("all steps", topk)]
    found = [Phase("dense first stage", args.num_experts / 2), Phase("steady stage", topk)]
    limit = args.moe_relu_activation_limit * topk
    if topk < limit < args.num_experts / 2:
        found.insert(1, Phase("on the way", limit))
    return found


def lines(
    args: argparse.Namespace,
    given: dict[str, object],
    plan: Plan,
    stages: list[parameters.Stage],
    parameters_of: tuple[int, int],
) -> Iterator[str]:
    """The estimate as text.

    Args:
        args: Megatron's validated arguments, for `plan.gpus` processes.
        given: `paper.settings` of the arguments before they were adapted to this machine.
        plan: where it would run.
        stages: see `parameters.stages`.
        parameters_of: those of the whole model and of its experts; see `parameters.total`.
    """
    gpu = plan.accelerator
    layout = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "data": args.data_parallel_size,
    }
    if args.num_experts:
        layout["expert"] = args.expert_model_parallel_size
    yield f"Plan: {plan.gpus} x {plan.kind} ({gpu.memory:g} GiB, {gpu.tflops:g} TFLOP/s dense bf16)"
    yield "  parallel sizes  " + ", ".join(f"{name} {size}" for name, size in layout.items())
    layers = {"local": "plain PyTorch", "transformer_engine": "Transformer Engine"}
    yield f"  layers          {layers.get(args.transformer_impl, args.transformer_impl)} (--transformer-impl)"
    if plan.paper:
        yield ""
        yield from _paper_lines(given, *plan.paper)
    yield ""
    yield from _compute_lines(args, plan, *parameters_of)
    if args.save and args.save_interval:
        yield ""
        yield _checkpoint_line(args, parameters_of[0])
    yield ""
    yield from _memory_lines(args, plan, stages)


def _checkpoint_line(args: argparse.Namespace, total: int) -> str:
    interval = args.save_retain_interval or args.save_interval
    number = math.ceil(args.train_iters / interval)  # one is saved after the last iteration in any case
    size = memory.checkpoint_bytes(args, total) / 1e9
    told = f"{number} of {size:,.1f} GB, {number * size:,.1f} GB in all"
    return f"Checkpoints: {told}, one every {interval} iterations; --save-retain-interval N keeps fewer"


def figures(args: argparse.Namespace, total: int, experts: int) -> dict[str, float]:
    """What other tools ask for: parameters, training FLOPs of a sequence, and FLOPs of one more active expert in each
    MoE layer."""
    topk = args.moe_router_topk if args.num_experts else 0
    flops = compute.flops_per_sequence(args)
    return {
        "total_parameters": total,
        "active_parameters": active_parameters(args, total, experts),
        "flops_per_sequence": flops,
        "flops_per_sequence_and_expert": compute.flops_per_sequence(args, topk + 1) - flops if topk else 0.0,
    }


def active_parameters(args: argparse.Namespace, total: int, experts: int) -> int:
    """Parameters that a token meets where it has k experts."""
    return total - experts + (experts * args.moe_router_topk // args.num_experts if args.num_experts else 0)


def _paper_lines(given: dict[str, object], size: str, routing: str) -> Iterator[str]:
    """Where the paper does not give a value, the scripts of its authors' fork do."""
    different = paper.differences(given, size, routing)
    yield f"Settings that differ from the paper's {size.upper()} {routing}: {'' if different else 'none'}"
    for flag, value, expected, source in different:
        yield f"  {flag} {value}   ({source}: {expected})"


def _compute_lines(args: argparse.Namespace, plan: Plan, total: int, experts: int) -> Iterator[str]:
    per_sequence = compute.flops_per_sequence(args)
    sequences = args.train_samples or args.train_iters * args.global_batch_size
    tokens, flops = sequences * args.seq_length, sequences * per_sequence
    hours = plan.accelerator.hours(flops, plan.gpus, plan.utilization)
    yield "Model and compute"
    yield f"  total parameters    {total:,}"
    yield f"  active parameters   {active_parameters(args, total, experts):,} per token"
    yield f"  FLOPs               {per_sequence / args.seq_length / 1e9:.3f} G per token"
    yield f"                      {per_sequence / 1e9:,.0f} G per sequence of {args.seq_length} tokens"
    yield f"                      {flops:.3g} for the whole run of {tokens:,} tokens"
    yield f"  time                {_duration(hours)} on {plan.gpus} x {plan.kind} at {plan.utilization:.0%} utilization"
    for phase in phases(args)[:-1][:1]:
        ratio = compute.flops_per_sequence(args, phase.experts_per_token) / per_sequence
        yield f"  FLOPs count k experts per token; a step of the {phase.title} takes {ratio:.2f} times as many."
    yield from (f"  {line}" for line in compute.CONVENTION)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:.1f} days)" if hours > 48 else "")


def _memory_lines(args: argparse.Namespace, plan: Plan, stages: list[parameters.Stage]) -> Iterator[str]:
    columns = []
    for phase in phases(args):
        stage, needed = memory.fullest_stage(args, stages, phase.experts_per_token)
        experts = f", {phase.experts_per_token:g} of {args.num_experts} experts" if args.num_experts else ""
        columns.append((f"{phase.title}{experts}", stage, needed))
    yield "Memory of a GPU, GiB" + "".join(f"{title:>36}" for title, _, _ in columns)
    for name in ("weights", "gradients", "optimizer", "activations", "total"):
        yield f"  {name:<18}" + "".join(f"{getattr(needed, name) / 2**30:36.2f}" for _, _, needed in columns)
    if len(stages) > 1:
        places = sorted({stage + 1 for _, stage, _ in columns})
        yield f"  in the fullest of {len(stages)} pipeline stages ({', '.join(map(str, places))})"
    yield f"  without {memory.NOT_COUNTED}"
    largest = max(needed.total for _, _, needed in columns)
    available = plan.accelerator.memory * 2**30
    if largest > available:
        yield f"  WARNING: {largest / 2**30:.1f} GiB are more than a {plan.kind} has."
        yield "  Take a smaller micro-batch, more expert, tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."
