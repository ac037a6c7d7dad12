"""Test Transformer Engine's layer specification and the interface of its experts without a GPU.

Its kernels do not run: Megatron's `TEGroupedMLP` gets linear layers of plain PyTorch with the same interface.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron.core.extensions import transformer_engine_spec_provider as provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.remoe.layer import layer as remoe_layer
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.layer.specs import REMOE_LAYER, replace_classes, with_router
from megatron.remoe.routing.router import ReLURouter
from tests.layers import HIDDEN, compare_with_oracle, make_config, make_layer, make_topk_config

pytestmark = pytest.mark.usefixtures("process_groups")


class GroupedLinear(torch.nn.Module):
    """A layer with the interface of Transformer Engine's grouped ones: rows sorted by expert, and rows per expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, config, init_method, **_unused) -> None:
        super().__init__()
        weights = (torch.empty(outputs, inputs, dtype=config.params_dtype) for _ in range(experts))
        self.weights = torch.nn.ParameterList(map(init_method, weights))

    def forward(self, rows: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        assert all(type(size) is int for size in m_splits) and sum(m_splits) == len(rows)
        parts = zip(rows.split(m_splits), self.weights, strict=True)
        return torch.cat([part @ weight.T for part, weight in parts]), None


@pytest.fixture
def engine_spec(monkeypatch: pytest.MonkeyPatch) -> ModuleSpec:
    """Return Megatron's specification of a MoE layer of Transformer Engine, even if that is not installed."""
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider)
    monkeypatch.setattr(provider, "TEColumnParallelGroupedLinear", GroupedLinear)
    monkeypatch.setattr(provider, "TERowParallelGroupedLinear", GroupedLinear)
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=True)


def test_only_router_and_layer_are_replaced(engine_spec: ModuleSpec) -> None:
    changed = with_router(engine_spec)
    mlp, stock = changed.submodules.mlp, engine_spec.submodules.mlp
    assert (stock.func, mlp.func) == (MoELayer, ReMoELayer)
    submodules, stock_submodules = mlp.keywords["submodules"], stock.keywords["submodules"]
    assert submodules.router is ReLURouter
    assert submodules.experts is stock_submodules.experts and submodules.experts.func is TEGroupedMLP
    assert submodules.shared_experts is stock_submodules.shared_experts
    for name in ("self_attention", "pre_mlp_layernorm", "mlp_bda", "sharded_state_dict_keys_map"):
        assert getattr(changed.submodules, name) is getattr(engine_spec.submodules, name)


def test_kernels_are_for_any_routing(engine_spec: ModuleSpec) -> None:
    """Top-k layers use a plan too, with sizes on the host. Their results equal those of Megatron's layer."""
    stock, planned = (
        spec.submodules.mlp(config=make_topk_config(moe_router_topk=2, moe_grouped_gemm=True), layer_number=1).cuda()
        for spec in (engine_spec, replace_classes(engine_spec, REMOE_LAYER))
    )
    assert (type(stock), type(planned)) == (MoELayer, ReMoELayer) and type(planned.router) is type(stock.router)
    planned.load_state_dict(stock.state_dict())
    tokens, results = torch.randn(9, 2, HIDDEN, dtype=torch.float64, device=planned.router.weight.device), []
    for layer in (stock, planned):
        layer.set_layer_number(1)
        copy = tokens.clone().requires_grad_()
        output, _ = layer(copy)
        results.append((output, *torch.autograd.grad(output.square().sum(), [copy, *layer.parameters()])))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("limit", [0.0, 1.0], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("topk", [1, 2])
def test_engine_experts_equal_oracle(engine_spec: ModuleSpec, topk: int, dispatcher: str, limit: float) -> None:
    """Experts accept the sizes and gates of any number of pairs; outputs and gradients are right."""
    torch.manual_seed(topk)
    settings = {"moe_router_topk": topk, "moe_token_dispatcher_type": dispatcher, "moe_relu_activation_limit": limit}
    config = make_config(**settings, moe_grouped_gemm=True, moe_relu_l1_reg_coeff_init=0.3)
    layer = make_layer(config, spec=engine_spec)
    assert type(layer.experts) is TEGroupedMLP
    tokens = torch.randn(9, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device, requires_grad=True)
    assert compare_with_oracle(layer, tokens, coefficient=0.3) != 18 * topk


@pytest.mark.slow
@torch.compiler.set_stance("force_eager")  # compiling Megatron's SwiGLU takes half a minute
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_activations_are_recomputed_in_chunks_and_without(engine_spec, dispatcher: str, monkeypatch) -> None:
    """Experts recompute by themselves only without chunks. Megatron then reads the engine's FP8 state, here off."""
    off = SimpleNamespace(is_fp8_enabled=lambda: False)
    monkeypatch.setattr(random, "FP8GlobalStateManager", off, raising=False)
    for name in ("activation_recompute_forward", "fp8_autocast"):
        monkeypatch.setattr(random, name, lambda **_options: nullcontext(), raising=False)
    tokens, results, weights = torch.rand(9, 2, HIDDEN, dtype=torch.float64), [], None
    for recompute in ({}, {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}):
        settings = recompute | {"moe_token_dispatcher_type": dispatcher, "moe_relu_activation_limit": 1.0}
        layer = make_layer(make_config(moe_grouped_gemm=True, **settings), spec=engine_spec)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        for number_active in (4, 1):
            layer.router.weight.data.abs_()[number_active:].neg_()
            output, _ = layer(copy := tokens.clone().to(layer.router.weight.device).requires_grad_())
            assert layer.experts.activation_recompute == (bool(recompute) and number_active == 1)
            output.square().sum().backward()
            results.append([copy.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for number in (0, 1):
        for mine, plain in zip(results[number + 2], results[number], strict=True):
            torch.testing.assert_close(mine, plain)


def test_a_layer_in_fp8_is_recomputed_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """With FP8, a layer uses the engine's checkpoint function, called as in Megatron's layer; otherwise it does not."""
    groups = []

    def checkpoint(forward, distributes: bool, _tracker, group, *inputs: torch.Tensor | None) -> torch.Tensor:
        assert not distributes
        groups.append(group)
        return forward(*inputs)

    monkeypatch.setattr(remoe_layer, "te_checkpoint", checkpoint)
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    layer = make_layer(make_config(moe_relu_activation_limit=0.0, **recompute))
    tokens, outputs = torch.randn(9, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device), []
    for precision in (None, "hybrid"):
        layer.config.fp8 = precision
        outputs.append(layer(tokens)[0])
    assert groups == [layer.tp_group]
    torch.testing.assert_close(*outputs)
