"""Test `--moe-relu-launch-ahead`: the host does not wait for the number of pairs, and wrong guesses change nothing."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.kernels.backend import backend_of
from megatron.remoe.layer import grouped_swiglu, plan
from megatron.remoe.layer import layer as moe_layer
from megatron.remoe.layer.layer import ReMoELayer
from tests.layer.test_host_syncs import Waits, reads
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")
SETTINGS: dict[str, Any] = {
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_kernels": "triton",
    "transformer_impl": "local",
    "moe_router_dtype": "fp32",
    "params_dtype": torch.bfloat16 if torch.cuda.is_available() else torch.float32,
}


@pytest.fixture(autouse=True)
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use `grouped_mm` on CPUs too, where it is a loop, and treat experts of any size as large."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(grouped_swiglu, "takes_grouped_kernel", lambda _fc1: True)
        monkeypatch.setattr(moe_layer, "takes_grouped_kernel", lambda _fc1: True)
    monkeypatch.setattr(grouped_swiglu, "LARGE_MATRIX", 1)


def make_layers(**changes: Any) -> list[ReMoELayer]:
    """Return two equal layers, the second of which launches ahead, with weight gradients in `main_grad`."""
    layers = []
    for ahead in (False, True):
        layer = make_layer(make_config(**SETTINGS, **changes, moe_relu_launch_ahead=ahead), fused=True)
        for weight in (layer.experts.fc1, layer.experts.fc2):
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
            weight.grad_added_to_main_grad = False
        layers.append(layer)
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def numbers(layer: ReMoELayer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and all gradients of a forward and backward pass."""
    tokens = tokens.clone().requires_grad_()
    output = layer(tokens)[0]
    (output.float() * torch.arange(output.numel(), device=output.device).view_as(output)).sum().backward()
    assert isinstance(layer.router, TopKRouter) and tokens.grad is not None
    found = [output, tokens.grad, layer.router.weight.grad, layer.experts.fc1.main_grad, layer.experts.fc2.main_grad]
    return [tensor.detach().clone() for tensor in found]


def tokens_of(layer: ReMoELayer, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(16, 2, HIDDEN, dtype=layer.config.params_dtype, device=layer.router.weight.device)


@pytest.mark.parametrize("limit", [0.0, 2.0], ids=["unbounded", "bounded"])
def test_results_are_equal_and_nothing_is_waited_for(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first step waits. Uninitialized rows at the end, which hold NaN here, do not change the results."""
    waiting, ahead = make_layers(moe_relu_activation_limit=limit)
    calls, tokens = reads(monkeypatch), tokens_of(ahead, 1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        for step in range(3):
            expected = numbers(waiting, tokens.roll(step, dims=0))
            calls.clear()
            if step and torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("error")
            with Waits() as waits:
                found = numbers(ahead, tokens.roll(step, dims=0))
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
            assert len(calls) == (step == 0) and waits.found == []
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(ahead.router.counts.table, waiting.router.counts.table)


@pytest.mark.parametrize("recent", [0.01, 1.0], ids=["far too low", "too low"])
def test_a_guess_that_is_too_low_changes_nothing(recent: float, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, ahead = make_layers()
    assert ahead._guess is not None
    ahead._guess.recent = recent

    def multiply(rows: torch.Tensor, *rest: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        assert offs[-1] <= len(rest[0] if rows.shape[1] == len(rest[0]) else rows), "a GPU's kernel would not check"
        return grouped_mm(rows, *rest, offs=offs)

    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped_swiglu.functional, "grouped_mm", multiply)
    expected = numbers(waiting, tokens_of(waiting, 5))
    calls = reads(monkeypatch)
    found = numbers(ahead, tokens_of(ahead, 5))
    assert len(calls) == 1 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(ahead.router.counts.table, waiting.router.counts.table)
    assert ahead._guess.pairs(32) >= int(map_of(ahead, 5).sum()), "the next guess is right"


def map_of(layer: ReMoELayer, seed: int) -> torch.Tensor:
    return layer.router(tokens_of(layer, seed))[1]


def test_a_dense_layer_waits_and_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, ahead = make_layers(moe_relu_activation_limit=1.0)
    tokens = tokens_of(ahead, 1).abs()
    for layer in (waiting, ahead):
        layer.router.weight.data.abs_()  # all experts are active for all tokens
    calls = reads(monkeypatch)
    for _ in range(2):
        pairs = [numbers(layer, tokens) for layer in (waiting, ahead)]
        assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))
    assert len(calls) == 8, "each of them, twice, reads the number for one chunk and for some"


@pytest.mark.parametrize("num_pairs", [0, 1, 5, 14, 40])
def test_a_plan_for_a_guess_stays_within_its_memory(num_pairs: int) -> None:
    """Rows without a pair read token 0, pairs without a row are left out, and no index is out of range."""
    torch.manual_seed(3)
    backend = backend_of(make_config(**SETTINGS))
    map_TE = torch.rand(9, 4, device=make_layers()[0].router.weight.device) < 0.4
    probs_TE = torch.where(map_TE, torch.rand_like(map_TE, dtype=torch.float32), 0.0)
    order, gates_P = backend.plan(probs_TE, map_TE, backend.count(map_TE)[1], num_pairs)
    expert, token = map_TE.T.nonzero().unbind(dim=1)
    kept = min(num_pairs, len(token))
    token_index_P, by_token = order
    assert torch.equal(token_index_P[:kept].long(), token[:kept]) and not token_index_P[kept:].any()
    assert torch.equal(gates_P[:kept], probs_TE[token, expert][:kept])
    ends, rows = by_token.split([10, num_pairs])
    assert ends[0] == 10 and ends.max() <= 10 + num_pairs and bool((ends.diff() >= 0).all())
    assert not kept or rows[:kept].max() < num_pairs


def test_the_guess_follows_the_number_of_pairs() -> None:
    guess = plan.Guess(topk=2, limit=4.0)
    assert guess.pairs(100) == 0, "nothing is known"
    guess.learn(200, 100)
    assert guess.pairs(100) == 225, "one step of 1/8 above 2, and one more"
    guess.learn(150, 100)
    assert 1.9 < guess.recent < 2.0, "it falls slowly"
    guess.learn(390, 100)
    assert guess.pairs(100) == 0, "chunks may be needed"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"moe_kernels": "torch"}, "needs --moe-kernels triton"),
        ({"transformer_impl": "transformer_engine"}, "needs --transformer-impl local"),
        ({"expert_model_parallel_size": 2}, "needs --expert-model-parallel-size 1"),
        ({"add_bias_linear": True}, "needs --disable-bias-linear"),
    ],
)
def test_what_it_cannot_be_used_with_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_config(**(SETTINGS | changes), moe_relu_launch_ahead=True)
