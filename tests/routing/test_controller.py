"""Test λ: its initial value, its direction, the reset of counts, exactness after many steps and in checkpoints."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from megatron.core.transformer.module import Float16Module
from megatron.remoe.routing.controller import SparsityController
from megatron.remoe.routing.counts import RoutingCounts
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.fixture
def make_controller(kernels: str) -> Callable[..., SparsityController]:
    """Return a function that makes a controller of one router from changes to `make_config`, for each backend."""
    return partial(build_controller, moe_kernels=kernels)


def build_controller(**changes) -> SparsityController:
    config = make_config(**{"moe_relu_l1_reg_coeff_init": 1e-6} | changes)
    return SparsityController([make_layer(config)], config)


def route(controller: SparsityController, active: int, tokens: int) -> None:
    """Route `tokens` tokens: the first `active` go to one expert each, the others to none."""
    router = controller.routers[0]
    router.weight.data.zero_()
    router.weight.data[0, 0] = 1.0
    hidden = torch.zeros(tokens, 1, HIDDEN, dtype=torch.float64, device=router.weight.device)
    hidden[:active, 0, 0] = 1.0
    router(hidden)


def exponent(controller: SparsityController) -> int:
    return int(controller.routers[0].l1_exponent)


def test_neutral_before_the_first_update(make_controller) -> None:
    controller = make_controller(moe_relu_l1_reg_coeff_init=3e-7)
    assert exponent(controller) == 0
    assert controller.routers[0].l1_coefficient().item() == 3e-7
    assert controller.summary() is None
    controller.update()
    assert exponent(controller) == 0, "without tokens"


def test_direction_and_reset(make_controller) -> None:
    """With k = 1 the target is one active pair per token: more pairs raise λ, fewer lower it."""
    controller = make_controller()
    router = controller.routers[0]
    hidden = torch.ones(8, 1, HIDDEN, dtype=torch.float64, device=router.weight.device)
    router.weight.data.fill_(1.0)
    router(hidden)
    controller.update()
    assert exponent(controller) == 1
    assert not router.counts.table.any()
    summary = controller.summary()
    assert summary.sparsity == 0.0 and summary.target_sparsity == 0.75
    assert summary.l1_coefficient == 1e-6
    assert summary.tokens_per_expert == {1: [1.0] * 4}

    route(controller, active=3, tokens=8)
    controller.update()
    assert exponent(controller) == 0
    assert controller.summary().sparsity == pytest.approx(1 - 3 / 32)

    route(controller, active=8, tokens=8)
    controller.update()
    assert exponent(controller) == 0, "on the target, sign(0) = 0"
    assert controller.summary().sparsity == 0.75


def test_running_sums_are_over_all_steps(make_controller) -> None:
    """Steps that are not finite count too, because they were computed."""
    controller = make_controller()
    assert controller.totals() == {"total_active_pairs": 0, "total_layer_tokens": 0}
    route(controller, active=3, tokens=8)
    route(controller, active=8, tokens=8)  # micro-batches of one step add up
    controller.update()
    assert controller.summary().sparsity == 1 - 11 / 64
    assert controller.summary().l1_loss == (0.5625 + 4) / 2, "their mean"
    route(controller, active=2, tokens=8)
    controller.routers[0].weight.grad = torch.full_like(controller.routers[0].weight, float("nan"))
    controller.update()
    assert controller.totals() == {"total_active_pairs": 13, "total_layer_tokens": 24}


def test_exact_after_a_thousand_updates_and_bounded() -> None:
    controller = build_controller(moe_relu_l1_reg_coeff_init=2e-8, moe_relu_l1_reg_coeff_multiplier=1.05)
    router = controller.routers[0]
    for step in range(1040):
        router.counts = RoutingCounts.zeros(4, router.weight.device)
        active = 2**24 + (2 if step % 4 else 0) if step < 1000 else 2**25
        router.counts["tokens_per_expert"][0], router.counts["tokens"][...] = active, 2**24 + 1
        controller.update()
        if step == 999:
            assert exponent(controller) == 500 and controller.totals()["total_layer_tokens"] == 1000 * (2**24 + 1)
            assert router.l1_coefficient().item() == pytest.approx(2e-8 * 1.05**500, rel=1e-12)
    assert 1e3 / 1.05 < router.l1_coefficient() <= 1e3


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_one_lambda_or_one_for_each_layer(scope: str) -> None:
    """Layer 1 routes too many tokens and layer 2 too few; together they route too many."""
    controller = build_controller(num_layers=3, moe_relu_sparsity_scope=scope)
    layers = [make_layer(controller.config) for _ in range(3)]
    for number, layer in enumerate(layers, start=1):
        layer.set_layer_number(number)
    controller = SparsityController(layers, controller.config)
    for _ in range(2):
        for router, active in zip(controller.routers, (20, 3, 8), strict=True):
            router.counts["tokens_per_expert"][0], router.counts["tokens"][...] = active, 8
            router.counts["micro_batches"][...] = 1
        controller.update()
    exponents = [int(router.l1_exponent) for router in controller.routers]
    assert exponents == ([2, 2, 2] if scope == "model" else [2, -2, 0])
    summary = controller.summary()
    last = [1, 1, 1] if scope == "model" else [1, -1, 0]
    assert list(summary.layer_l1_coefficient.values()) == pytest.approx([1e-6 * 1.2**n for n in last])
    assert summary.l1_coefficient == pytest.approx(1e-6 * 1.2 ** (sum(last) / 3))


def test_lambda_returns_at_once_from_its_floor() -> None:
    controller = build_controller()
    for _ in range(40):
        route(controller, active=3, tokens=8)
        controller.update()
    assert 1e-8 <= controller.routers[0].l1_coefficient() < 1.2e-8
    controller.routers[0].counts = RoutingCounts.zeros(4, controller.device)
    controller.routers[0].counts["tokens_per_expert"][0], controller.routers[0].counts["tokens"][...] = 9, 8
    controller.update()
    assert controller.routers[0].l1_coefficient() > 1.2e-8


@pytest.mark.parametrize("fp16", [False, True])
def test_fp16_steps_that_the_optimizer_skips_move_nothing(fp16: bool) -> None:
    """With --fp16, the optimizer skips a step in which only an expert's gradient overflows."""
    controller = build_controller()
    controller.config.fp16 = fp16
    expert = torch.nn.Linear(2, 2).weight
    controller = SparsityController([torch.nn.ParameterList([expert]), *controller.routers], controller.config)
    expert.grad = torch.full_like(expert, float("inf"))
    route(controller, active=3, tokens=8)
    controller.update()
    assert exponent(controller) == (0 if fp16 else -1)


def test_saved_and_loaded_exactly_under_bf16() -> None:
    def half_precision_layer():
        config = make_config(params_dtype=torch.bfloat16, bf16=True, moe_router_dtype="fp32")
        return Float16Module(config, make_layer(config))

    saved, loaded = half_precision_layer(), half_precision_layer()
    saved.module.router.l1_exponent.fill_(-271)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.module.router.weight.dtype == torch.bfloat16
    assert loaded.module.router.l1_exponent.dtype == torch.int64
    assert int(loaded.module.router.l1_exponent) == -271
    assert loaded.module.router.l1_coefficient().dtype == torch.float64
    assert loaded.module.router.l1_coefficient() == saved.module.router.l1_coefficient()


def test_a_step_that_is_not_finite_moves_nothing(make_controller) -> None:
    controller = make_controller(moe_relu_layer_floor=1e-3)
    router = controller.routers[0]
    hidden = torch.full((8, 1, HIDDEN), float("nan"), dtype=torch.float64, device=router.weight.device)
    router(hidden)[0].sum().backward()
    controller.update()
    assert exponent(controller) == 0 and not router.guarded

    router.weight.grad = torch.zeros_like(router.weight)
    route(controller, active=3, tokens=8)
    controller.update()
    assert exponent(controller) == -1, "nothing of the steps before is left in the counters"
    assert controller.summary().sparsity == pytest.approx(1 - 3 / 32)


def test_large_gradients_of_half_precision_are_finite(make_controller) -> None:
    """With --fp16, gradients include the loss scale, so their sum can exceed fp16's range. `weight.grad` is None."""
    controller = make_controller()
    router = controller.routers[0]
    gradient = torch.full_like(router.weight, 30000.0, dtype=torch.float16)
    router.weight.main_grad = gradient
    for _ in range(2):
        route(controller, active=3, tokens=8)
        controller.update()
        assert exponent(controller) == -1
        gradient[0, 0] = float("inf")


def test_gradients_that_are_not_finite_move_nothing_though_the_router_is_off() -> None:
    """A router that is off for all tokens has a gradient of 0, whatever the loss is."""
    config = make_config(moe_relu_layer_floor=1e-3, moe_relu_l1_reg_coeff_init=1e-6)
    layer = torch.nn.ModuleDict({"input_layernorm": torch.nn.RMSNorm(HIDDEN).cuda(), "mlp": make_layer(config)})
    controller = SparsityController([layer], config)
    norm, router = layer["input_layernorm"].weight, controller.routers[0]
    route(controller, active=0, tokens=8)
    router.weight.grad = torch.zeros_like(router.weight)
    norm.grad = torch.full_like(norm, float("nan"))
    controller.update()
    assert exponent(controller) == 0 and not router.guarded
    norm.grad = torch.zeros_like(norm)
    route(controller, active=0, tokens=8)
    controller.update()
    assert exponent(controller) == -1 and router.guarded
    norm.grad.fill_(float("nan"))
    route(controller, active=8, tokens=8)
    controller.update()
    assert exponent(controller) == -1 and router.guarded


def test_guard_marks_layers_that_are_all_but_off(make_controller) -> None:
    controller = make_controller(moe_relu_layer_floor=0.1, moe_router_topk=2)
    guarded, in_force = [], []
    for active in (0, 3, 4, 20):  # of 20 tokens with k = 2: the floor is 4
        route(controller, active=active, tokens=20)
        controller.update()
        guarded.append(int(controller.routers[0].guarded))
        in_force.append(controller.summary().guarded_layers)
    assert guarded == [1, 1, 0, 0]
    assert in_force == [[], [1], [1], []], "during the step"
    assert exponent(controller) == -4 and controller.summary().target_sparsity == 0.5, "always below 40 pairs"


def test_each_layer_has_its_own_guard_and_all_have_the_same_exponent(kernels: str) -> None:
    """The middle one of 3 layers is dense, so its row stays empty."""
    config = make_config(num_layers=3, moe_relu_layer_floor=0.1, moe_kernels=kernels)
    layers = [make_layer(config) for _ in range(2)]
    layers[1].set_layer_number(3)
    controller = SparsityController(layers, config)
    hidden = torch.ones(20, 1, HIDDEN, dtype=torch.float64, device=controller.device)
    for router, sign in zip(controller.routers, (1.0, -1.0), strict=True):
        router.weight.data.fill_(sign)
        router.l1_exponent.fill_(5)
        router(hidden)
    controller.update()
    assert [int(router.l1_exponent) for router in controller.routers] == [6, 6]
    assert [int(router.guarded) for router in controller.routers] == [0, 1]
    assert controller.summary().layer_sparsity == {1: 0.0, 3: 1.0}
    assert not any(router.counts.table.any() for router in controller.routers)


def test_rank_without_router() -> None:
    config = make_config()
    controller = SparsityController([torch.nn.Linear(2, 2)], config)
    controller.update()
    assert controller.routers == [] and controller.summary().layer_sparsity == {}
