"""Test `moe_relu_normalize`: gates are s · c · ReLU(l / ‖l‖), and L1 uses them before they are scaled."""

import pytest
import torch

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.remoe.routing.gate_scale import initial_scale
from megatron.remoe.routing.router import ReLURouter
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


def make_router(kernels: str, **changes) -> tuple[ReLURouter, torch.Tensor]:
    """Return a router of 4 experts whose scale s is 2, and tokens `[20, 2, hidden]`."""
    torch.manual_seed(3)
    changes |= {"moe_kernels": kernels, "moe_relu_normalize": True, "moe_relu_l1_reg_coeff_init": 0.5}
    router = make_layer(make_config(**changes)).router
    router.gate_scale.scale.data.fill_(2.0)
    return router, torch.randn(20, 2, HIDDEN, dtype=torch.float64, device=router.weight.device)


def direction_gates(router: ReLURouter, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = tokens.view(-1, HIDDEN) @ weight.T
    return (logits / logits.norm(dim=1, keepdim=True)).relu()


@pytest.mark.parametrize("most", [None, 1])
def test_gates_do_not_depend_on_the_size_of_logits(most: int | None, kernels: str) -> None:
    router, tokens = make_router(kernels, moe_relu_max_experts=most)
    probs, routing_map = router(tokens)
    gates = direction_gates(router, tokens, router.weight)
    if most:
        gates = torch.where(gates == gates.amax(dim=1, keepdim=True), gates, 0.0)
    torch.testing.assert_close(probs, 2 * initial_scale(4, 1) * gates)
    assert torch.equal(routing_map, gates > 0)
    router.weight.data *= 8
    torch.testing.assert_close(router(tokens)[0], probs)


def test_gradients(kernels: str) -> None:
    """L1 uses the gates before they are scaled, so it has no gradient for s; padding has none at all."""
    router, tokens = make_router(kernels, moe_relu_l1_reg_load_balancing=False)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, dtype=torch.float64, device=tokens.device))
    padding = (torch.arange(20, device=tokens.device) >= 15).unsqueeze(1).repeat(1, 2)
    factors = torch.randn(40, 4, dtype=torch.float64, device=tokens.device)
    (router(tokens, padding)[0] * factors).sum().backward()
    weight, scale = (part.detach().clone().requires_grad_() for part in (router.weight, router.gate_scale.scale))
    gates = direction_gates(router, tokens, weight) * ~padding.reshape(-1, 1)
    loss = (scale * initial_scale(4, 1) * gates * factors).sum() + 0.5 * gates.sum() / 30
    loss.backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(router.gate_scale.scale.grad, scale.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("experts, topk", [(8, 1), (32, 1), (32, 4), (128, 2), (8, 8)])
def test_the_initial_scale_makes_the_largest_squares_add_up_to_one(experts: int, topk: int) -> None:
    logits = torch.randn(50_000, experts, generator=torch.Generator().manual_seed(1))
    squares = (logits / logits.norm(dim=1, keepdim=True)).relu().square().topk(topk, dim=1).values
    assert initial_scale(experts, topk) == pytest.approx(float(squares.sum(dim=1).mean()) ** -0.5, rel=3e-3)
