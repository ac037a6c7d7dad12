"""Make layers with a baseline router, and tokens for them."""

from typing import Any

import torch

from megatron.remoe.baselines import ROUTERS
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.routing.refusals import RELU_VARIANTS
from tests import layers
from tests.kernels import DEVICE
from tests.layers import HIDDEN, make_config

SEQUENCE, BATCH = 8, 3
PADDING = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool, device=DEVICE)
PADDING[-3:, 0] = True  # the last tokens of the first sequence


def make_layer(name: str, fused: bool = False, **changes: Any) -> ReMoELayer:
    settings: dict[str, Any] = {"moe_relu_routing": name in RELU_VARIANTS, "moe_router_topk": 2}
    layer = layers.make_layer(make_config(moe_baseline_router=name, **settings | changes), fused, ROUTERS[name])
    if name == "hash":
        layer.router.token_ids = torch.arange(BATCH * SEQUENCE, device=DEVICE).view(BATCH, SEQUENCE) % 5
    return layer


def make_tokens() -> torch.Tensor:
    return torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, device=DEVICE, requires_grad=True)
