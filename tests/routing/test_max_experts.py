"""Test `moe_relu_max_experts`: the largest gates are computed, but L1 and S count all positive gates."""

from functools import partial

import pytest
import torch

from megatron.remoe.routing.controller import SparsityController
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.fixture
def capped(kernels: str):
    """Return two routers with equal weights, the second with at most 2 of 4 experts per token, and tokens."""
    torch.manual_seed(3)
    make = partial(make_config, moe_kernels=kernels, moe_relu_l1_reg_coeff_init=0.5)
    free, capped = make_layer(make()).router, make_layer(make(moe_relu_max_experts=2)).router
    capped.load_state_dict(free.state_dict())
    return free, capped, torch.randn(40, 1, HIDDEN, dtype=torch.float64, device=free.weight.device)


def test_the_largest_gates_are_computed(capped) -> None:
    free, capped, tokens = capped
    for router in (free, capped):
        router.train()
    (gates, active), (kept, computed) = free(tokens), capped(tokens)
    assert (active.sum(dim=1) > 2).any()
    assert torch.equal(computed.sum(dim=1), active.sum(dim=1).clamp(max=2))
    torch.testing.assert_close(kept.sum(dim=1), gates.topk(2, dim=1).values.sum(dim=1))
    assert torch.equal(kept > 0, computed)
    capped.eval()
    assert torch.equal(capped(tokens)[1], computed)


def test_regularization_and_sparsity_see_all_gates(capped) -> None:
    free, capped, tokens = capped
    gradients = [torch.autograd.grad(router(tokens)[0].sum() * 0, router.weight)[0] for router in (free, capped)]
    torch.testing.assert_close(*gradients)
    left_out = int(capped.counts["left_out"])
    capped.eval()(tokens)  # counts nothing
    for name in ("tokens_per_expert", "tokens", "l1_loss", "micro_batches"):
        torch.testing.assert_close(free.counts[name], capped.counts[name])
    assert left_out == (free(tokens)[1].sum(dim=1) - 2).clamp(min=0).sum() > 0
    controller = SparsityController([capped], capped.config)
    controller.update()
    active = (1 - controller.summary().sparsity) * 160
    assert controller.totals() == {"total_active_pairs": round(active) - left_out, "total_layer_tokens": 40}


def test_the_language_loss_reaches_computed_gates_alone(capped) -> None:
    _, capped, tokens = capped
    capped.l1_exponent.fill_(-1000)  # λ is 0
    logits = (tokens @ capped.weight.detach().T).requires_grad_()
    probs, computed = capped.routing(logits)
    probs.sum().backward()
    torch.testing.assert_close(logits.grad.view(-1, 4), computed.to(logits.dtype))
