"""Model the time of a training step on a GPU. Nothing is measured, and no operation overlaps another.

An operation takes the time of its bytes or of its FLOPs, whichever is longer. The host launches operations one after
another, and the GPU can wait for it. A rehearsal counts operations, launches and collectives.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from ..console.flags import above_zero
from .gpus import GPUS, Gpu

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

# Shares of the data sheet's figures, until --rate gives measured rates. Bandwidth: copies on H100 and H200 with PyTorch
# 2.11 reach 3.0 and 4.3 TB/s. Grouped: Transformer Engine's product of 8 experts, 509 to 650 TFLOP/s on H100
# (NVIDIA/TransformerEngine#2045). Link: NCCL's bound for NVLink, 360 of 450 GB/s on Hopper. Products, and attention at
# head size 128: assumed, between published figures.
SHARES = {"products": 0.57, "grouped": 0.57, "attention": 0.46, "bandwidth": 0.9, "link": 0.8}
NETWORK = 50.0  # GB/s per direction from each GPU to other nodes: 400 Gbit/s, as in a DGX H100
SMALLEST = 2.3  # microseconds of the shortest kernel; assumed
# Microseconds of a collective per doubling of its ranks, within a node and between nodes: `hwLatencies` of NCCL's
# tuning model, for a tree with the protocol Simple.
LATENCY, NETWORK_LATENCY = 4.0, 14.0
# Microseconds of the host for each call of a Python function, and for each launch with PyTorch's work around it. They
# are fitted to the CPU time of two 182M steps over the no-op CUDA on an AMD EPYC Zen 5 with Python 3.13: 103 ms with
# 73,400 calls and 4,783 launches, and 123 ms with 43,600 and 9,603. The hosts of H100s take HOST times as long: 114 ns
# for a call that takes the EPYC 77 to 98 (pytorch/pytorch#187862), and 8.7 µs, driver included, for a Triton launch
# that takes it 5.2 (vllm-project/vllm#34838). DRIVER, the time of the launch itself, is assumed.
FRAME, LAUNCH, HOST, DRIVER = 0.8, 9.0, 1.3, 2.0


def rates(gpu: Gpu) -> dict[str, float]:
    """Return the rates of the time model for a kind of GPU.

    Returns:
        name → rate: products, grouped, attention in TFLOP/s; bandwidth in TB/s; link, network in GB/s; the others in
        microseconds.
    """
    figures = {kind: SHARES[kind] * gpu.tflops for kind in ("products", "grouped", "attention")}
    figures |= {"bandwidth": SHARES["bandwidth"] * gpu.bandwidth, "link": SHARES["link"] * gpu.link}
    figures |= {"network": NETWORK, "smallest": SMALLEST, "latency": LATENCY, "network_latency": NETWORK_LATENCY}
    figures |= {"frame": HOST * FRAME, "launch": HOST * LAUNCH + DRIVER}
    return {kind: round(rate, 3) for kind, rate in figures.items()}


def read_rate(text: str) -> tuple[str, float]:
    """Convert NAME=VALUE to a rate's name and value; an argparse type."""
    name, _, value = text.partition("=")
    names = rates(GPUS["h100"])
    if name not in names:
        raise argparse.ArgumentTypeError(f"{text!r}: choose a name from {', '.join(names)}")
    return name, above_zero(value)


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
        rates: from `rates`.
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
