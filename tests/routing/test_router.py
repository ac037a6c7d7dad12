"""Test the router: gates, padding, evaluation, the L1 term and the guard."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from megatron.remoe.routing.counts import RoutingCounts
from megatron.remoe.routing.router import ReLURouter
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.fixture
def make_router(kernels: str) -> Callable[..., ReLURouter]:
    """Return a function that makes a router from changes to `make_config`, for each backend."""
    return partial(build_router, moe_kernels=kernels)


def build_router(**changes) -> ReLURouter:
    return make_layer(make_config(**changes)).router


def random_tokens(router: ReLURouter) -> torch.Tensor:
    """Return float64 `[6, 2, HIDDEN]`."""
    return torch.randn(6, 2, HIDDEN, dtype=torch.float64, device=router.weight.device)


def test_gates_are_relu_and_map_is_where_they_are_positive(make_router) -> None:
    router = make_router()
    tokens = random_tokens(router)
    probs, routing_map = router(tokens)
    logits = tokens.reshape(-1, HIDDEN) @ router.weight.T
    torch.testing.assert_close(probs, logits.relu())
    assert torch.equal(routing_map, logits > 0)
    assert routing_map.dtype == torch.bool


@pytest.mark.parametrize("guarded", [0, 1])
def test_padding_is_neither_routed_counted_nor_guarded(make_router, guarded: int) -> None:
    router = make_router(moe_relu_l1_reg_coeff_init=0.5)
    router.guarded.fill_(guarded)
    tokens = random_tokens(router)
    padding = torch.zeros(6, 2, dtype=torch.bool, device=tokens.device)
    padding[4:, 1] = True

    probs, routing_map = router(tokens, padding)
    counts = router.counts
    (probs.sum() * 0).backward()
    l1_gradient = router.weight.grad.clone()

    assert not routing_map.view(6, 2, -1)[4:, 1].any() and not probs.view(6, 2, -1)[4:, 1].any()
    assert counts["tokens"] == 10 and counts.active == routing_map.sum()

    router.counts, router.weight.grad = RoutingCounts.zeros(router.num_experts, tokens.device), None
    kept = tokens.reshape(-1, HIDDEN)[~padding.reshape(-1)].unsqueeze(1)
    probs, _ = router(kept)
    (probs.sum() * 0).backward()
    torch.testing.assert_close(router.counts.table, counts.table)
    torch.testing.assert_close(router.weight.grad, l1_gradient, rtol=1e-6, atol=1e-8)
    router(tokens, torch.ones_like(padding))
    assert router.counts.table.isfinite().all(), "after a micro-batch of padding alone"


def test_evaluation_and_no_grad_count_nothing(make_router) -> None:
    router = make_router()
    tokens = random_tokens(router)
    with torch.no_grad():
        router(tokens)
    router.eval()
    router(tokens)
    assert not router.counts.table.any()


@pytest.mark.parametrize("guarded", [0, 1])
def test_gradients_follow_the_loss_scale_and_those_of_l1_the_coefficient(make_router, guarded: int) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    torch.manual_seed(5)
    router = make_router(moe_relu_l1_reg_coeff_init=0.5)
    router.guarded.fill_(guarded)
    tokens = random_tokens(router)

    def l1_gradient(scale: float) -> torch.Tensor:
        probs, _ = router(tokens)  # before the scale is set, as in Megatron's schedules
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), scale, dtype=torch.float64, device=tokens.device))
        return torch.autograd.grad(probs.sum() * 0, router.weight)[0]

    once = l1_gradient(1.0)
    assert once.any()
    torch.testing.assert_close(l1_gradient(0.25), 0.25 * once)
    router.l1_exponent += 3
    torch.testing.assert_close(l1_gradient(1.0), once if guarded else 1.2**3 * once)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, dtype=torch.float64, device=tokens.device))


@pytest.mark.parametrize(("balances", "loss", "weights"), [
    # Of 4 tokens, 3 and 1 go to two of 4 experts, k = 1: f_e = E / (k T) · tokens is 3 and 1.
    (True, (3 * (1 + 2 + 3) + 1 * 4) / 4, [3 / 4, 1 / 4]),
    # The paper's equation 9: f_e is 1. In both, L_reg = 1/T · Σ f_e · gates.
    (False, (1 + 2 + 3 + 4) / 4, [1 / 4, 1 / 4]),
])  # fmt: skip
def test_l1_by_hand(make_router, balances: bool, loss: float, weights: list[float]) -> None:
    router = make_router(moe_relu_l1_reg_coeff_init=0.5, moe_relu_l1_reg_load_balancing=balances)
    rows = [[1.0, -1, -1, -1], [2, -1, -1, -1], [3, -1, -1, -1], [-1, 4, -1, -1]]
    logits = torch.tensor(rows, device=router.weight.device).unsqueeze(1).requires_grad_()
    probs, _ = router.routing(logits)
    probs.backward(torch.zeros_like(probs))
    torch.testing.assert_close(router.counts["l1_loss"].item(), loss)
    expected = torch.zeros(4, 1, 4, device=logits.device)
    expected[:3, 0, 0], expected[3, 0, 1] = 0.5 * weights[0], 0.5 * weights[1]
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("guarded", [0, 1])
def test_per_token_loss_scales_the_gradients_by_the_tokens(make_router, guarded: int) -> None:
    """With a loss per token, Megatron later divides all gradients by the number of tokens."""
    torch.manual_seed(6)
    router = make_router(moe_relu_l1_reg_coeff_init=0.5)
    router.guarded.fill_(guarded)
    tokens = random_tokens(router)
    plain = torch.autograd.grad(router(tokens)[0].sum() * 0, router.weight)[0]
    router.calculate_per_token_loss = True
    per_token = torch.autograd.grad(router(tokens)[0].sum() * 0, router.weight)[0]
    torch.testing.assert_close(per_token, 12 * plain)


@pytest.fixture
def dead_router(make_router):
    """Return a router whose gates are off for all of 12 tokens, and the tokens."""
    router = make_router(num_moe_experts=4, moe_relu_l1_reg_coeff_init=0.5)
    hidden = torch.rand(12, 1, HIDDEN, dtype=torch.float64, device=router.weight.device) + 0.5
    router.weight.data.fill_(-1.0)
    return router, hidden


def test_the_guard_revives_a_dead_router(dead_router) -> None:
    """Instead of L1, the guard has the gradient of -0.1 · mean(logits) where gates are off. It turns gates on again."""
    router, hidden = dead_router
    router.guarded.fill_(1)
    probs, _ = router(hidden)
    probs.sum().backward()
    logits = hidden @ router.weight.detach().t()
    weight = router.weight.detach().requires_grad_()
    expected = torch.autograd.grad((-0.1 * (hidden @ weight.t()).mean()), weight)[0]
    assert (logits < 0).all()
    torch.testing.assert_close(router.weight.grad, expected)
    for _ in range(1000):
        router.weight.grad = None
        probs, routing_map = router(hidden)
        if routing_map.any():
            break
        probs.sum().backward()
        router.weight.data -= router.weight.grad
    assert routing_map.any()
    router.weight.grad = None
    probs.sum().backward()
    gates = torch.relu(hidden @ weight.t())
    pushed = -0.1 * ((hidden @ weight.t()) * (gates == 0)).mean()
    torch.testing.assert_close(router.weight.grad, torch.autograd.grad(gates.sum() + pushed, weight)[0])
