"""Build small MoE layers for tests, and compute their outputs with a naive oracle."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.layer.experts import GroupedExperts
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.layer.specs import with_fused_layers, with_router
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.router import ReLURouter

HIDDEN, FFN = 16, 12


class Watch(TorchDispatchMode):
    """A mode that collects what a function returns for the name and arguments of each operation, except None."""

    def __init__(self, look: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.look, self.seen = look, list[Any]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (found := self.look(str(function).removeprefix("aten."), args)) is not None:
            self.seen.append(found)
        return function(*args, **(kwargs or {}))


def make_config(kind: type[ReMoEConfig] = ReMoEConfig, **changes: Any) -> ReMoEConfig:
    """Return a ReMoE configuration in float64 for layers of hidden size 16 and expert size 12."""
    return kind(**(_settings() | {"moe_relu_routing": True, "moe_relu_layer_floor": 0.0} | changes))


def make_topk_config(**changes: Any) -> TransformerConfig:
    """Return Megatron's configuration for top-k layers of this size, or this project's if `moe_kernels` is given."""
    kind = ReMoEConfig if "moe_kernels" in changes else TransformerConfig
    return kind(**(_settings() | {"moe_router_pre_softmax": True} | changes))


def _settings() -> dict[str, Any]:
    return {
        "num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "moe_ffn_hidden_size": FFN,
        "num_attention_heads": 2, "num_moe_experts": 4, "moe_router_topk": 1, "moe_router_dtype": "fp64",
        "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none", "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu, "bias_activation_fusion": False, "add_bias_linear": False,
        "params_dtype": torch.float64, "pipeline_dtype": torch.float64, "init_method_std": 0.5,
        "gradient_accumulation_fusion": False, "cuda_graph_modules": [],
    }  # fmt: skip


def make_layer(config: TransformerConfig, fused=False, router: type | None = None, spec: Any = None) -> ReMoELayer:
    """Build a ReMoE or top-k layer from Megatron's layer specification, with number 1 and the configuration's dtype.

    Args:
        config: from `make_config` or `make_topk_config`.
        fused: whether to use grouped experts instead of one small layer per expert.
        router: a class that replaces the ReLU or top-k router.
        spec: a layer specification that replaces Megatron's local one.
    """
    spec = spec or get_gpt_layer_local_spec(config.num_moe_experts, False, normalization="RMSNorm")
    if router is not None or getattr(config, "moe_relu_routing", False):
        spec = with_router(spec, router or ReLURouter)
    spec = with_fused_layers(spec) if fused else spec
    layer = spec.submodules.mlp(config=config, layer_number=1)  # type: ignore[union-attr]
    layer.set_layer_number(1)
    layer.to(config.params_dtype)
    return layer.cuda()


def expert_weights(layer: ReMoELayer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each expert's fc1 `[2·ffn, hidden]` (gate, then up) and fc2 `[hidden, ffn]`."""
    if isinstance(layer.experts, GroupedExperts):
        return list(zip(layer.experts.fc1, layer.experts.fc2, strict=True))
    if isinstance(layer.experts, TEGroupedMLP):  # with the linear layers of test_transformer_engine.py
        return list(zip(layer.experts.linear_fc1.weights, layer.experts.linear_fc2.weights, strict=True))
    return [(expert.linear_fc1.weight, expert.linear_fc2.weight) for expert in layer.experts.local_experts]


def oracle(
    tokens: torch.Tensor, router_weight: torch.Tensor, experts: list[tuple[torch.Tensor, torch.Tensor]], topk: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Compute the paper's layer and its L_reg with load balancing (section 3.4) with loops.

    Args:
        tokens: `[num_tokens, hidden]`.
        router_weight: `[num_experts, hidden]`.
        experts: fc1 and fc2 of each expert.
        topk: k of the target sparsity.

    Returns:
        Outputs `[num_tokens, hidden]`, L_reg as a scalar, and the number of active pairs.
    """
    num_tokens, num_experts = len(tokens), len(experts)
    outputs, active = [], [[False] * num_experts for _ in range(num_tokens)]
    gates = [[torch.relu(tokens[t] @ router_weight[e]) for e in range(num_experts)] for t in range(num_tokens)]
    for t in range(num_tokens):
        output = torch.zeros_like(tokens[t])
        for e, (fc1, fc2) in enumerate(experts):
            if gates[t][e] > 0:
                active[t][e] = True
                gate, up = (fc1 @ tokens[t]).chunk(2)
                output = output + gates[t][e] * (fc2 @ (torch.nn.functional.silu(gate) * up))
        outputs.append(output)
    load = [num_experts / (topk * num_tokens) * sum(row[e] for row in active) for e in range(num_experts)]
    l1 = sum(load[e] * gates[t][e] for t in range(num_tokens) for e in range(num_experts)) / num_tokens
    return torch.stack(outputs), l1, sum(map(sum, active))


def gradients(loss: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of the loss; they are 0 for parameters that it does not depend on."""
    actual = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, actual, strict=True)]


def compare_with_oracle(layer: ReMoELayer, tokens: torch.Tensor, coefficient: float) -> int:
    """Assert that outputs, L1, counts and gradients equal the oracle's; return the number of active pairs."""
    config = layer.config
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, dtype=torch.float64, device=tokens.device))
    weights = list(layer.experts.parameters())
    direction = torch.randn_like(tokens)

    output, _ = layer(tokens)
    ours = gradients((output * direction).sum(), tokens, layer.router.weight, *weights)

    flat = tokens.reshape(-1, HIDDEN)
    expected, l1, pairs = oracle(flat, layer.router.weight, expert_weights(layer), config.moe_router_topk)
    loss = (expected.view_as(tokens) * direction).sum() + coefficient * l1
    theirs = gradients(loss, tokens, layer.router.weight, *weights)

    torch.testing.assert_close(output, expected.view_as(tokens), rtol=1e-10, atol=1e-12)
    for mine, right in zip(ours, theirs, strict=True):
        # Megatron's Switch loss is computed in float32.
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-7)
    counts = layer.router.counts
    assert counts.active == pairs and counts["tokens"] == len(flat)
    torch.testing.assert_close(counts["l1_loss"], l1.detach(), rtol=1e-6, atol=1e-7)
    return pairs
