"""Make layers with a baseline router, and tokens for them."""

from typing import Any

import torch

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.remoe.baselines import ROUTERS
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.layer.specs import with_fused_layers, with_router
from megatron.remoe.routing.refusals import RELU_VARIANTS
from tests.layers import HIDDEN, make_config

SEQUENCE, BATCH = 8, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_layer(name: str, fused: bool = False, **changes: Any) -> ReMoELayer:
    settings: dict[str, Any] = {"moe_relu_routing": name in RELU_VARIANTS, "moe_router_topk": 2}
    config = make_config(moe_baseline_router=name, **settings | changes)
    spec = with_router(get_gpt_layer_local_spec(config.num_moe_experts, False, normalization="RMSNorm"), ROUTERS[name])
    spec = with_fused_layers(spec) if fused else spec
    layer = spec.submodules.mlp(config=config, layer_number=1).to(DEVICE, torch.float64)  # type: ignore[union-attr]
    layer.set_layer_number(1)
    if name == "hash":
        layer.router.token_ids = torch.arange(BATCH * SEQUENCE, device=DEVICE).view(BATCH, SEQUENCE) % 5
    return layer


def make_tokens() -> torch.Tensor:
    return torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.float64, device=DEVICE, requires_grad=True)
