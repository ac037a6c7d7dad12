"""Test a cheaper start: larger steps of λ, bounds of λ, a limit of experts per token, and a sparse start."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.remoe.routing.controller import SparsityController, exponent_bounds
from megatron.remoe.routing.problems import relu_routing_problems
from tests.layers import HIDDEN, make_config, make_layer
from tests.routing.test_controller import exponent, route
from tests.tiny_model import RELU
from tests.trainings import TINY, records, run, series

pytestmark = pytest.mark.usefixtures("process_groups")
FASTER = {"moe_relu_l1_reg_start_power": 3, "moe_relu_l1_reg_start_setback": 5}


@pytest.fixture
def make_controller(kernels: str) -> Callable[..., SparsityController]:
    def of(**changes) -> SparsityController:
        config = make_config(moe_kernels=kernels, **changes)
        return SparsityController([make_layer(config)], config)

    return of


def exponents(controller: SparsityController, actives: list[int]) -> list[int]:
    """Return λ's exponent after steps with these numbers of active pairs of 8 tokens; the target is 8."""
    found = []
    for active in actives:
        controller.routers[0].counts = None
        route(controller, active=min(active, 8), tokens=8)
        controller.routers[0].counts["tokens_per_expert"][1] += active - min(active, 8)
        controller.update()
        found.append(exponent(controller))
    return found


def test_larger_steps_until_the_target_is_first_reached(make_controller) -> None:
    assert exponents(make_controller(), [16, 16, 4, 16]) == [1, 2, 1, 2]
    assert exponents(make_controller(**FASTER), [16, 16, 4, 16, 16, 4]) == [3, 6, 0, 1, 2, 1]
    assert exponents(make_controller(**FASTER), [16, 8, 8, 16]) == [3, -2, -2, -1], "on the target it is reached"


def test_a_step_that_is_not_finite_does_not_end_the_start(make_controller) -> None:
    controller = make_controller(**FASTER)
    route(controller, active=2, tokens=8)
    controller.routers[0].weight.grad = torch.full_like(controller.routers[0].weight, float("nan"))
    controller.update()
    assert exponent(controller) == 0 and not controller.routers[0].reached


def test_bounds_of_the_coefficient(make_controller) -> None:
    controller = make_controller(moe_relu_l1_reg_coeff_min=1e-8 / 1.2**2, moe_relu_l1_reg_coeff_max=1.5e-8)
    assert exponents(controller, [16] * 4 + [4] * 6) == [1, 2, 2, 2, 1, 0, -1, -2, -2, -2]
    assert exponent_bounds(make_config(moe_relu_l1_reg_coeff_max=1e-8)) == (None, 0)


def test_without_the_flags_the_state_is_as_before() -> None:
    assert set(make_layer(make_config()).router.state_dict()) == {"weight", "l1_exponent", "guarded"}


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
    torch.testing.assert_close(free.counts.table[:-1], capped.counts.table[:-1])
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


def test_a_sparse_start_gives_each_expert_its_share() -> None:
    torch.manual_seed(4)
    config = make_config(num_moe_experts=8, moe_router_topk=2, hidden_size=256, moe_relu_sparse_start=True)
    router = make_layer(config).router
    tokens = torch.nn.functional.rms_norm(torch.randn(4000, 1, 256, dtype=torch.float64), (256,))
    shares = router(tokens.to(router.weight.device))[1].double().mean(dim=0)
    assert (shares - 0.25).abs().max() < 0.03
    assert "bias" in router.state_dict() and router.bias.requires_grad


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"moe_relu_l1_reg_start_power": 0}, "--moe-relu-l1-reg-start-power 0"),
        ({"moe_relu_l1_reg_start_setback": 4}, "--moe-relu-l1-reg-start-setback 4"),
        ({"moe_relu_l1_reg_coeff_min": 1e-7}, "--moe-relu-l1-reg-coeff-min 1e-07"),
        ({"moe_relu_l1_reg_coeff_max": 1e-9}, "--moe-relu-l1-reg-coeff-max 1e-09"),
        ({"moe_relu_max_experts": 0}, "--moe-relu-max-experts 0"),
        ({"moe_relu_max_experts": 5}, "--moe-relu-max-experts 5"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, float], flag: str) -> None:
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    assert [problem for problem in relu_routing_problems(config) if flag in problem and "[REMOE-E205]" in problem]


ALL = """
    --moe-relu-l1-reg-coeff-init 1e-2 --moe-relu-l1-reg-start-power 4 --moe-relu-l1-reg-start-setback 2
    --moe-relu-max-experts 2 --moe-relu-l1-reg-coeff-max 1 --moe-relu-sparse-start
""".split()


@pytest.mark.slow
def test_a_training_resumes_exactly(data: Path, tmp_path: Path) -> None:
    """Resuming before S reaches the target, after 3 of 8 steps, logs the same as a training that does not stop."""
    flags = [*TINY, *RELU, *ALL[:-1], "--moe-relu-l1-reg-coeff-init", "1e-6", "--data-path", str(data)]
    whole = records(run(flags))
    saved = [*flags, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "100"]
    parts = records(run([*saved, "--exit-interval", "3"])) | records(run(saved))
    for lines in (whole, parts):
        del lines[5]["lm loss"]  # the second line after a process starts has the mean of two steps
    assert whole == parts and len(whole) == 8
    before, after = (float(whole[step]["l1 coefficient"]) for step in (4, 5))
    assert after / before == pytest.approx(1.2**4, rel=1e-5)


@pytest.mark.slow
def test_a_training_starts_in_larger_steps_and_sparse(data: Path) -> None:
    output = run([*TINY, *RELU, *ALL[:-1], "--data-path", str(data)])
    coefficients, sparsities = series(output, "l1 coefficient"), series(output, "sparsity")
    ratios = [after / before for before, after in zip(coefficients, coefficients[1:], strict=False)]
    assert sparsities[0] < 0.6 and ratios[0] == pytest.approx(1.2**4, rel=1e-5)
    assert series(run([*TINY, *RELU, *ALL, "--data-path", str(data)]), "sparsity")[0] == pytest.approx(0.875, abs=0.05)
