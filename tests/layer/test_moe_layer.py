"""Test router, L1 term, dispatch and experts together against an oracle in float64."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import CudaGraphModule
from megatron.remoe.layer.layer import ReMoELayer, supports_plans
from tests.layers import HIDDEN, compare_with_oracle, gradients, make_config, make_layer, make_topk_config

pytestmark = pytest.mark.usefixtures("process_groups")

CASES = [  # sequence, batch, experts, k, and the experts that all tokens activate (None: random ones)
    (1, 1, 2, 1, None), (5, 3, 4, 2, None), (16, 1, 8, 3, None),
    (6, 2, 4, 1, [0, 1, 2, 3]), (6, 2, 4, 1, []), (6, 2, 4, 1, [0]), (6, 2, 4, 1, [0, 1, 3]),
]  # fmt: skip


@pytest.mark.parametrize("fused", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_oracle(case: tuple[int, int, int, int, list[int] | None], dispatcher: str, fused: bool) -> None:
    """Megatron's alltoall always sends tokens · topk pairs: it drops pairs beyond that, or adds unrouted ones."""
    sequence, batch, experts, topk, active = case
    torch.manual_seed(sequence * 100 + experts)
    sizes = {"num_moe_experts": experts, "moe_router_topk": topk, "moe_token_dispatcher_type": dispatcher}
    layer = make_layer(make_config(**sizes, moe_relu_l1_reg_coeff_init=0.3), fused)
    tokens = torch.randn(sequence, batch, HIDDEN, dtype=torch.float64, device=layer.router.weight.device)
    if active is not None:
        tokens.abs_()
        layer.router.weight.data.abs_().neg_()[active] *= -1
    pairs = compare_with_oracle(layer, tokens.requires_grad_(), coefficient=0.3)
    assert active is None or pairs == sequence * batch * len(active)


@pytest.mark.parametrize("routing", ["ReLU", "top-k"])
def test_megatrons_default_experts_train(routing: str) -> None:
    """Experts with GeLU and biases have right gradients: the in-place addition that autograd refuses is avoided."""
    torch.manual_seed(4)
    make = make_config if routing == "ReLU" else make_topk_config
    gelu = torch.nn.functional.gelu
    layer = make_layer(make(add_bias_linear=True, gated_linear_unit=False, activation_func=gelu), fused=True)
    layer.router.bias = None  # `add_bias_linear` also gives a top-k router a bias
    for name, weight in layer.experts.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_()
    tokens = torch.randn(7, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device, requires_grad=True)
    flat, weights = tokens.view(-1, HIDDEN), [tokens, *layer.experts.parameters()]
    gates, _ = layer.router(tokens)
    expected, linear = 0.0, torch.nn.functional.linear
    for number, expert in enumerate(layer.experts.local_experts):
        hidden = gelu(linear(flat, expert.linear_fc1.weight, expert.linear_fc1.bias))
        output = linear(hidden, expert.linear_fc2.weight, expert.linear_fc2.bias)
        expected = expected + gates[:, number, None] * output
    right = gradients(expected.sin().sum(), *weights)
    output, _ = layer(tokens)
    torch.testing.assert_close(output, expected.view_as(output))
    for mine, theirs in zip(gradients(output.sin().sum(), *weights), right, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("limit", [0.0, 1.0], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_padding_has_no_experts(dispatcher: str, limit: float) -> None:
    """Other tokens keep their outputs. The mask is `[batch, sequence]`, and tokens are `[sequence, batch, hidden]`."""
    layer = make_layer(make_config(moe_token_dispatcher_type=dispatcher, moe_relu_activation_limit=limit))
    tokens = torch.randn(5, 3, HIDDEN, dtype=torch.float64, device=layer.router.weight.device)
    padding = torch.zeros(3, 5, dtype=torch.bool, device=tokens.device)
    padding[1, 2:] = True
    expected = layer(tokens)[0].masked_fill(padding.T.unsqueeze(-1), 0.0)
    torch.testing.assert_close(layer(tokens, padding_mask=padding)[0], expected)


def results(layer: ReMoELayer, tokens: torch.Tensor, output: torch.Tensor) -> list[torch.Tensor]:
    """Return the output, and the gradients of tokens and weights."""
    weights = [tokens, *layer.parameters()]
    return [output, *torch.autograd.grad(output.sin().sum(), weights)]


@pytest.mark.parametrize("fused", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize(("make", "changes"), [
    (make_config, {}), (make_config, {"moe_relu_activation_limit": 1.2}), (make_topk_config, {}),
], ids=["ReMoE", "in chunks", "top-k"])  # fmt: skip
def test_tritons_kernels_give_the_same(make: Callable[..., Any], changes: dict[str, Any], fused: bool) -> None:
    """The kernels' error against float64 is at most about twice that of PyTorch's operations in float32."""
    pytest.importorskip("triton")
    actual, weights = [], None
    single, double = ("fp32", torch.float32), ("fp64", torch.float64)
    for kernels, (router_dtype, dtype) in (("torch", double), ("torch", single), ("triton", single)):
        torch.manual_seed(5)
        model_parallel_cuda_manual_seed(5)  # one seed in a hundred has an error above the bound
        types = {"params_dtype": dtype, "pipeline_dtype": dtype, "moe_router_dtype": router_dtype}
        layer = make_layer(make(**types, **changes, moe_kernels=kernels, num_moe_experts=8, moe_router_topk=2), fused)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        tokens = torch.randn(7, 3, HIDDEN, device=layer.router.weight.device).to(dtype).requires_grad_()
        actual.append(results(layer, tokens, layer(tokens)[0]))
    for right, plain, mine in zip(*actual, strict=True):
        assert mine.dtype == plain.dtype == torch.float32
        apart, allowed = ((result.double() - right).abs().max() for result in (mine, plain))
        assert apart <= 2 * allowed + 1e-6 * right.abs().max()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_called_one_by_one_give_the_same(fused: bool) -> None:
    """Megatron's schedules that overlap layers call a layer's steps in this way."""
    torch.manual_seed(3)
    layer = make_layer(make_config(), fused=fused)
    tokens = torch.randn(7, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device, requires_grad=True)
    right = results(layer, tokens, layer(tokens)[0])
    layer(tokens[:3])  # its counts are not kept
    dispatched, gates = layer.preprocess(tokens, *layer.route(tokens))
    output, _ = layer.routed_experts_compute(*layer.dispatch(dispatched, gates))
    output = layer.postprocess(layer.combine(output), None)
    for mine, theirs in zip(results(layer, tokens, output), right, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_shared_experts_beside_dispatch() -> None:
    """--moe-shared-expert-overlap changes neither outputs nor gradients."""
    shared = {"moe_shared_expert_intermediate_size": 8, "moe_relu_activation_limit": 0.0}
    plain, beside = (make_layer(make_config(**shared, moe_shared_expert_overlap=on), True) for on in (False, True))
    beside.load_state_dict(plain.state_dict())
    tokens = torch.randn(7, 2, HIDDEN, dtype=torch.float64, device=plain.router.weight.device, requires_grad=True)
    for mine, right in zip(*(results(layer, tokens, layer(tokens)[0]) for layer in (beside, plain)), strict=True):
        torch.testing.assert_close(mine, right)


def test_tensor_parallelism_needs_sequence_parallelism() -> None:
    layer = make_layer(make_config())
    layer.attn_tp_group = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match="need sequence parallelism"):
        layer(torch.ones(1, 1, HIDDEN, dtype=torch.float64, device=layer.router.weight.device))


def test_megatron_dispatches_what_a_plan_cannot() -> None:
    assert supports_plans(make_topk_config())
    captured = [CudaGraphModule.moe_router, CudaGraphModule.moe_preprocess]
    for name, value in (("moe_permute_fusion", True), ("moe_latent_size", 8), ("cuda_graph_modules", captured)):
        topk = make_topk_config()
        setattr(topk, name, value)  # set later: the constructor would ask for Transformer Engine
        assert not supports_plans(topk)
