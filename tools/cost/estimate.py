"""The estimate of a training's cost, and how it is printed."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..recipes import flops
from . import data, memory, parameters
from .gpus import Accelerator


@dataclass(frozen=True)
class Plan:
    """The machine of a training.

    Attributes:
        gpus: their number.
        kind: name of the accelerator.
        accelerator: its figures.
        utilization: assumed share of its rate that the model's FLOPs reach.
    """

    gpus: int
    kind: str
    accelerator: Accelerator
    utilization: float


@dataclass(frozen=True)
class Phase:
    """A part of the training, with its number of experts per token."""

    title: str
    experts_per_token: float


def phases(args: argparse.Namespace) -> list[Phase]:
    """Return ReMoE's phases: dense, with half of the experts active; the moment when layers stop to work in chunks; the
    rest. Other models have one phase."""
    topk = args.moe_router_topk if args.num_experts else 0
    if not args.moe_relu_routing:
        return [Phase("all steps", topk)]
    found = [Phase("dense first stage", args.num_experts / 2), Phase("steady stage", topk)]
    limit = args.moe_relu_activation_limit * topk
    if topk < limit < args.num_experts / 2:
        found.insert(1, Phase("on the way", limit))
    return found


def plan_lines(args: argparse.Namespace, plan: Plan) -> Iterator[str]:
    """Yield machine and layout."""
    names = ("tensor_model", "pipeline_model", "context", "data", *["expert_model"] * bool(args.num_experts))
    sizes = (f"{name.removesuffix('_model')} {getattr(args, f'{name}_parallel_size')}" for name in names)
    layers = {"local": "plain PyTorch", "transformer_engine": "Transformer Engine"}
    gpu = plan.accelerator
    yield f"Plan: {plan.gpus} x {plan.kind} ({gpu.memory:g} GiB, {gpu.tflops:g} TFLOP/s dense bf16)"
    yield f"  parallel sizes  {', '.join(sizes)}"
    yield f"  layers          {layers.get(args.transformer_impl, args.transformer_impl)} (--transformer-impl)"


def lines(
    args: argparse.Namespace, plan: Plan, stages: list[parameters.Stage], total: int, experts: int
) -> Iterator[str]:
    """Yield model, compute, data, checkpoints and memory.

    Args:
        args: Megatron's validated arguments, for `plan.gpus` processes.
        plan: where it would run.
        stages: see `parameters.stages`.
        total, experts: parameters; see `parameters.total`.
    """
    yield ""
    yield from _compute_lines(args, plan, total, experts)
    if found := data.epochs_line(args, _sequences(args)):
        yield ""
        yield found
    if args.save and args.save_interval:
        yield ""
        yield _checkpoint_line(args, total)
    yield ""
    yield from _memory_lines(args, plan, stages)


def _sequences(args: argparse.Namespace) -> int:
    """Return the sequences of the whole training."""
    return args.train_samples or args.train_iters * args.global_batch_size


def _checkpoint_line(args: argparse.Namespace, total: int) -> str:
    interval = args.save_retain_interval or args.save_interval
    number = math.ceil(args.train_iters / interval)  # one is saved after the last iteration in any case
    size = memory.checkpoint_bytes(args, total) / 1e9
    return (
        f"Checkpoints: {number} of {size:,.1f} GB, {number * size:,.1f} GB in all, one every {interval} iterations; "
        "--save-retain-interval N keeps fewer"
    )


def active_parameters(args: argparse.Namespace, total: int, experts: int) -> int:
    """Return the parameters that a token with k experts uses."""
    return total - experts + (experts * args.moe_router_topk // args.num_experts if args.num_experts else 0)


def _compute_lines(args: argparse.Namespace, plan: Plan, total: int, experts: int) -> Iterator[str]:
    per_sequence = flops.flops_per_sequence(args)
    tokens, whole = _sequences(args) * args.seq_length, _sequences(args) * per_sequence
    hours = plan.accelerator.hours(whole, plan.gpus, plan.utilization)
    yield "Model and compute"
    yield f"  total parameters    {total:,}"
    yield f"  active parameters   {active_parameters(args, total, experts):,} per token"
    yield f"  FLOPs               {per_sequence / args.seq_length / 1e9:.3f} G per token"
    yield f"                      {per_sequence / 1e9:,.0f} G per sequence of {args.seq_length} tokens"
    yield f"                      {whole:.3g} for the whole run of {tokens:,} tokens"
    yield f"  time                {_duration(hours)} on {plan.gpus} x {plan.kind} at {plan.utilization:.0%} utilization"
    for phase in phases(args)[:-1][:1]:
        ratio = flops.flops_per_sequence(args, phase.experts_per_token) / per_sequence
        yield f"  FLOPs count k experts per token; a step of the {phase.title} takes {ratio:.2f} times as many."
    yield from (f"  {line}" for line in flops.CONVENTION)


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
        yield "  Choose a smaller micro-batch, more expert, tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."
