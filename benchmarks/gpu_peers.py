"""MoE layers of packages that bring kernels of their own for GPUs, for those that import; written for scattermoe 0.3,
megablocks 0.10 and sonic-moe 0.1.2.

Each module takes `[tokens, 1, hidden]` to the same shape and has its router's weight as `router_weight`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, silu


class ScatterMoE(torch.nn.Module):
    """Softmax, top-k, and scattermoe's SwiGLU experts."""

    def __init__(self, experts: int, hidden: int, ffn: int, topk: int) -> None:
        from scattermoe.mlp import GLUMLP

        super().__init__()
        self.topk = topk
        self.router_weight = torch.nn.Parameter(torch.empty(experts, hidden))
        self.experts = GLUMLP(hidden, ffn, experts, topk)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens.flatten(0, 1)
        gates, chosen = linear(rows, self.router_weight).softmax(dim=-1).topk(self.topk)
        return self.experts(rows, gates, chosen).view_as(tokens)


class MegaBlocks(torch.nn.Module):
    """megablocks' dropless layer with grouped products; without its balancing loss, which it keeps in a global list."""

    def __init__(self, experts: int, hidden: int, ffn: int, topk: int) -> None:
        from megablocks.layers.arguments import Arguments
        from megablocks.layers.dmoe import dMoE

        super().__init__()
        arguments = Arguments(
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            moe_num_experts=experts,
            moe_top_k=topk,
            moe_loss_weight=0,
            activation_fn=silu,
            mlp_type="glu",
            mlp_impl="grouped",
            bias=False,
            return_bias=False,
            fp16=False,
            bf16=True,
        )
        self.layer = dMoE(arguments)
        self.router_weight = self.layer.router.layer.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(tokens)


class SonicMoE(torch.nn.Module):
    """sonic-moe's layer."""

    def __init__(self, experts: int, hidden: int, ffn: int, topk: int) -> None:
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        super().__init__()
        self.layer = MoE(experts, topk, hidden, ffn, ActivationType.SWIGLU, add_bias=False, std=0.02)
        self.router_weight = self.layer.router.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer(tokens)[0]


PEERS: dict[str, Callable[[int, int, int, int], torch.nn.Module]] = {
    "scattermoe": ScatterMoE,
    "megablocks": MegaBlocks,
    "sonic-moe": SonicMoE,
}


def gpu_peers(
    experts: int, hidden: int, ffn: int, topk: int, router_weight: torch.Tensor, tokens: torch.Tensor
) -> dict[str, torch.nn.Module]:
    """Those that can be built and run here, in half precision on the GPU; why the others cannot goes to stderr.

    Args:
        experts, hidden, ffn, topk: number of experts, sizes, and active experts per token.
        router_weight: `[experts, hidden]`, on the GPU.
        tokens: `[tokens, 1, hidden]`, that a layer has to take.
    """
    found: dict[str, torch.nn.Module] = {}
    for name, peer in PEERS.items():

        def build(peer: Callable[..., Any] = peer) -> torch.nn.Module:
            layer = peer(experts, hidden, ffn, topk).to(device=router_weight.device, dtype=router_weight.dtype)
            layer.router_weight.data.copy_(router_weight)
            return layer

        found |= usable(name, build, tokens)
    return found


def usable(name: str, build: Callable[[], torch.nn.Module], tokens: torch.Tensor) -> dict[str, torch.nn.Module]:
    """Name → layer, where it can be built and run both ways; nothing where it cannot, and why goes to stderr."""
    try:
        layer = build()
        layer(tokens).sum().backward()
    except Exception as error:  # kernels that were built for another PyTorch fail in many ways, some when they run
        print(f"{name}: not measured, {error}", file=sys.stderr)
        return {}
    return {name: layer}
