"""Model the time of a training step on a GPU. Nothing is measured, and no operation overlaps another.

An operation takes the time of its bytes or of its FLOPs, whichever is longer. The host launches operations one after
another, and the GPU can wait for it. A rehearsal counts operations, launches and collectives; `step_estimate`
calculates them from Megatron's arguments.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# PyTorch's grouped_mm reaches F / (F + 800) of the rate with experts of FFN size F. For a layer's forward pass this
# gives 10.5 and 11.1 ms; ByteDance-Seed/VeOmni#460 has 10.2 (128 experts of 768, 242 TFLOP/s), 11.4 (512 of 512, 181).
HALF_RATE_EXPERT = 800
# Below this head size, exponentials limit attention: cuDNN's causal attention at size 64 and sequence length 1024
# reaches 288 TFLOP/s forward (FlashAttention-3, arXiv 2407.08608, figure 5), and about 220 backward.
FULL_RATE_HEAD = 128
# The GPU's waits as a share of the host's work, while the host is faster than the GPU. Simulating a step's launches in
# order gave 0.09 to 0.13, for the 182M, 469M and 978M with 1 to 8 micro-batches.
STALLS = 0.11
RINGS = {"all_reduce": 2.0}  # how often a ring sends (n - 1)/n of the bytes; once for other collectives
POINT_TO_POINT = ("isend", "irecv")
DENSE_SHARE = 0.5  # share of the experts that is active before training
BELOW_LIMIT = 0.9  # share of the activation limit up to which no layer of a rehearsal works in chunks
TITLES = {"dense": "dense start", "way": "on the way", "steady": "at the target"}


def experts_by_phase(args: argparse.Namespace) -> dict[str, float]:
    """Return the phases of a run: phase → experts computed per token in every MoE layer.

    The phases are the dense start, the moment when layers stop using chunks ("way") if the start uses them, and the
    rest ("steady"). Top-k has a dense start only with --moe-warmup-topk.

    Args:
        args: Megatron's arguments. Before validation, granularity is missing, and only the phases' names are right.
    """
    topk = float(args.moe_router_topk) if args.num_experts else 0.0
    if not (args.num_experts and args.moe_relu_routing):
        return ({"dense": float(args.moe_warmup_topk)} if args.moe_warmup_topk else {}) | {"steady": topk}
    dense = max(topk, min(DENSE_SHARE * args.num_experts, args.moe_relu_max_experts or args.num_experts))
    limit = args.moe_relu_activation_limit * topk
    way = {"way": BELOW_LIMIT * limit} if topk < limit < dense else {}
    return {"dense": dense, **way, "steady": topk}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one GPU.

    Attributes:
        products: matrix products and attention.
        traffic: memory-bound operations.
        waiting: waits for the host.
        links, network: collectives within a node, and between nodes.
        bubble: factor by which the pipeline's idle time lengthens the GPU's work.
    """

    products: float
    traffic: float
    waiting: float
    links: float
    network: float
    bubble: float

    @property
    def least(self) -> float:
        """Return the seconds if the GPU never waits for the host, and all collectives are hidden."""
        return (self.products + self.traffic) * self.bubble

    @property
    def most(self) -> float:
        """Return the seconds if nothing is hidden."""
        return (self.products + self.traffic + self.waiting) * self.bubble + self.links + self.network

    def limit(self) -> str:
        """Return the longest part of `most`, and its share."""
        work = self.products + self.traffic + self.waiting
        parts = {
            "matrix products": self.products,
            "memory traffic": self.traffic,
            "waits for the host": self.waiting,
            "collectives within nodes": self.links,
            "collectives between nodes": self.network,
            "the pipeline's idle time": work * (self.bubble - 1),
        }
        name = max(parts, key=lambda part: parts[part])
        return f"{name} ({parts[name] / self.most:.0%})"


def conclude(time: StepTime | None, iterations: float, needed: float | None, available: float) -> Iterator[str]:
    """Yield the end of a plan. Its last line has whether the run fits, its hours (best and worst) and their limit.

    Args:
        time: of a step; None if unknown.
        iterations: steps of the run; 0 if unknown.
        needed: GiB of memory; None if unknown, but more than `available`.
        available: GiB of the GPU's memory.
    """
    fits = needed is not None and needed <= available
    if not fits:
        yield "To fit, choose a smaller micro-batch, more expert, tensor or pipeline parallelism, or"
        yield "  --recompute-granularity selective --recompute-modules moe."
    amount = "more than" if needed is None else f"{needed:.1f} of"
    verdict = f"{'Fits' if fits else 'DOES NOT FIT'}: {amount} {available:g} GiB"
    if time is None:
        yield verdict
        return
    yield f"Time: {time.least * 1e3:,.0f} to {time.most * 1e3:,.0f} ms a step. Modelled, not measured"
    least, most = (format_duration(seconds * iterations) for seconds in (time.least, time.most))
    hours = f"; at best {least}, {most} if nothing overlaps" if iterations else ""
    yield f"{verdict}{hours}; limited by {time.limit()}"


def format_duration(seconds: float) -> str:
    """Return a duration as text: in minutes below an hour, else in hours, with the days above 48 hours."""
    hours = seconds / 3600
    if hours < 1:
        return f"{hours * 60:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:.1f} days)" if hours > 48 else "")


def grouped_share(args: argparse.Namespace) -> float:
    """Return the share of its rate that PyTorch's grouped product reaches with experts of this size."""
    ffn = args.moe_ffn_hidden_size / args.expert_tensor_parallel_size
    return ffn / (ffn + HALF_RATE_EXPERT)


def attention_share(args: argparse.Namespace) -> float:
    """Return the share of its rate that attention reaches with heads of this size."""
    head = args.qk_head_dim + args.qk_pos_emb_head_dim if args.multi_latent_attention else args.kv_channels
    return min(1.0, head / FULL_RATE_HEAD)


def collective_seconds(call: dict[str, Any], rates: dict[str, float]) -> float:
    """Return the seconds of collectives of one kind and group, from their bytes and latencies.

    Args:
        call: "kind", "ranks" of the group, whether it is "within_node", "times", and "bytes" of all times.
        rates: from `gpus.rates`.
    """
    ranks, within = call["ranks"], call["within_node"]
    sent = call["bytes"] * (1 if call["kind"] in POINT_TO_POINT else (ranks - 1) / ranks)
    rate = rates["link" if within else "network"] * 1e9
    latency = rates["latency" if within else "network_latency"] * 1e-6 * math.log2(ranks)
    return RINGS.get(call["kind"], 1.0) * sent / rate + call["times"] * latency


def host_seconds(calls: float, launches: float, rates: dict[str, float]) -> float:
    """Return the host's seconds for these calls of Python functions and launches, by the rates "frame" and "launch"."""
    return 1e-6 * (rates["frame"] * calls + rates["launch"] * launches)


def waiting_seconds(host: float, gpu: float) -> float:
    """Return how long the GPU waits for the host in a step, given the seconds of their work."""
    return max(STALLS * host, host - gpu)
