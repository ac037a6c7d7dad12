"""Test `--cuda-graph-impl full_iteration`: a layer has room for the maximum of pairs, and the host reads nothing."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.layer import grouped_swiglu
from megatron.remoe.layer import layer as moe_layer
from megatron.remoe.layer.layer import ReMoELayer
from megatron.remoe.routing.controller import SparsityController
from tests.layer.test_host_syncs import Waits, reads
from tests.layer.test_launch_ahead import SETTINGS, numbers, tokens_of
from tests.layers import make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")
# About half of the experts are active at the start; the target of a quarter makes every update raise λ.
BOUNDED = SETTINGS | {"moe_router_topk": 1, "moe_relu_max_experts": 3, "moe_relu_activation_limit": 0.0}
GRAPH = {"cuda_graph_impl": "full_iteration"}


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use `grouped_mm` on CPUs too, where it is a loop, and one product for all weight gradients, as in a graph."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(grouped_swiglu, "takes_grouped_kernel", lambda _fc1: True)
        monkeypatch.setattr(moe_layer, "takes_grouped_kernel", lambda _fc1: True)
    monkeypatch.setattr(grouped_swiglu, "LARGE_MATRIX", 2**40)


def make_layers(*changes: dict[str, Any]) -> list[tuple[ReMoELayer, SparsityController]]:
    """Return layers with equal weights, and their controllers."""
    made: list[tuple[ReMoELayer, SparsityController]] = []
    for change in changes:
        config = make_config(**(BOUNDED | change))
        layer = make_layer(config, fused=True)
        layer.load_state_dict((made[0][0] if made else layer).state_dict())
        made.append((layer, SparsityController([layer], config)))
    return made


def step(layer: ReMoELayer, controller: SparsityController, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return output and gradients of a step with weight gradients in `main_grad`, and update λ."""
    layer.router.weight.grad = None
    for weight in (layer.experts.fc1, layer.experts.fc2):
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    found = numbers(layer, tokens)
    controller.update()
    return found


@pytest.mark.parametrize("most", [3, 4], ids=["some are left out", "all are computed"])
def test_steps_are_equal_and_nothing_is_read(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps equal a plain layer's, also in a copy with the same state. Rows without a pair, NaN here, do not count."""
    room = {"moe_relu_max_experts": most}
    (plain, controller), (graph, other), (copy, third) = make_layers(room, room | GRAPH, room | GRAPH)
    assert plain.waits and not graph.waits
    calls, tokens = reads(monkeypatch), tokens_of(graph, 1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        for number in range(4):
            expected = step(plain, controller, tokens.roll(number, dims=0))
            calls.clear()
            with Waits() as waits:
                found = step(graph, other, tokens.roll(number, dims=0))
            assert calls == [] and waits.found == []
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            expected_summary, summary = controller.summary(), other.summary()
            assert summary is not None and expected_summary is not None
            assert summary == expected_summary
            assert int(graph.router.l1_exponent) == int(plain.router.l1_exponent) == number + 1
            if number == 1:
                copy.load_state_dict(graph.state_dict())
                graph, other = copy, third
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or the CUDA that does nothing")
def test_a_step_is_captured() -> None:
    """A graph of forward, backward and update, replayed with other tokens, takes the same steps as a plain layer."""
    (plain, controller), (graph, other) = make_layers({}, GRAPH)
    tokens = [tokens_of(plain, seed) for seed in range(4)]
    given, captured = tokens[0].clone(), torch.cuda.CUDAGraph()
    step(graph, other, given)
    torch.cuda.synchronize()
    with torch.cuda.graph(captured):
        found = step(graph, other, given)
    is_rehearsed = torch.cuda.get_device_name().endswith("(rehearsal)")
    for number, later in enumerate(tokens):
        if number:
            given.copy_(later)
            captured.replay()
        if is_rehearsed:
            continue  # the plain layer would read a number that was never computed
        expected = step(plain, controller, later)
        if number:
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
            assert torch.equal(graph.router.l1_exponent, plain.router.l1_exponent)


@pytest.mark.parametrize("training", [True, False])
def test_room_does_not_depend_on_the_number(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts get `moe_relu_max_experts` rows per token however many are active, in evaluation too."""
    (layer, _) = make_layers(GRAPH)[0]
    layer.train(training)
    rows: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _module, arguments: rows.append(len(arguments[2])))
    tokens = tokens_of(layer, 1).abs()
    weight = layer.router.weight.detach().clone()
    outputs: list[torch.Tensor] = []
    for scaled in (-weight.abs(), weight, weight.abs()):
        layer.router.weight.data.copy_(scaled)
        outputs.append(layer(tokens)[0].detach().float().norm())
    assert rows == [3 * 32] * 3 and outputs[0] == 0 < outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_kernels": "torch"}, "full_iteration needs --moe-kernels triton"),
        ({"expert_model_parallel_size": 2}, "needs --expert-model-parallel-size 1"),
        ({"moe_relu_max_experts": None, "moe_relu_activation_limit": 2.0}, "-max-experts, --moe-relu-activation-limit"),
        ({"moe_relu_start_topk": 3, "moe_relu_start_steps": 9}, "no --moe-relu-start-topk"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local with --cuda-graph-modules full cannot be used"),
        ({"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]}, "--cuda-graph-modules attn cannot be used"),
        ({"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe_router"]}, "modules moe_router cannot"),
        (
            {"moe_relu_routing": False, "moe_baseline_router": "random"},
            "full_iteration .* --moe-baseline-router random",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_config(**(BOUNDED | GRAPH | changes))


def test_attention_of_a_hybrid_model_can_be_captured() -> None:
    config = make_config(is_hybrid_model=True, cuda_graph_impl="local", cuda_graph_modules=["attn"])
    assert config.cuda_graph_impl == "local"
