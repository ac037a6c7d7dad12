"""Test the kernels against PyTorch's operations: gates and plan to the last digit, sums and SwiGLU against float64."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import gates, plan, pytorch, swiglu, triton
from tests.kernels import DEVICE, rounding

SHAPES = {  # tokens, experts, share of the map that is on
    "no token": (0, 4, 0.5),
    "one token": (1, 1, 1.0),
    "no pair": (5, 3, 0.0),
    "dense": (18, 8, 1.0),
    "empty experts": (33, 20, 0.03),
    "many experts": (20, 512, 0.03),
    "more experts than tiles": (3, 1000, 0.2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (1, 8), (37, 5), (2100, 3), (40, 512)], ids=str)
def test_gates(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sums and gradients are equal up to rounding, the rest exactly; also if all gates are off or on."""
    torch.manual_seed(shape[0])
    for shift in (0.0, -100.0, 100.0):
        logits = (torch.randn(shape, device=DEVICE) + shift).to(dtype)
        probs, routing_map, counts, sums = gates.gate(logits)
        right_probs, right_map, right_counts, right_sums = pytorch.gate(logits)
        assert torch.equal(probs, right_probs) and torch.equal(routing_map, right_map)
        assert torch.equal(counts.sum(dim=1), right_counts.sum(dim=1))
        torch.testing.assert_close(sums, right_sums, rtol=1e-6, atol=1e-6)
        d_probs, on, off = torch.randn_like(logits), torch.rand(shape[1], device=DEVICE), torch.ones(1) / 3
        given = d_probs, routing_map, on, off.to(DEVICE)
        actual, right = (one.gate_backward(*given).double() for one in (gates, pytorch))
        torch.testing.assert_close(actual, right, rtol=2 * rounding(dtype), atol=rounding(dtype))


def test_nonfinite_logits() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [float("inf"), -1.0]], device=DEVICE)
    probs, routing_map, _, sums = gates.gate(logits)
    assert routing_map.tolist() == [[False, True], [True, False]]
    assert probs.tolist() == [[0.0, 1.0], [float("inf"), 0.0]] and sums.tolist() == [float("inf"), 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "share"), SHAPES.values(), ids=SHAPES)
def test_plan(num_tokens: int, num_experts: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    probs = torch.rand(num_tokens, num_experts, device=DEVICE).to(dtype).requires_grad_()
    routing_map = torch.rand(num_tokens, num_experts, device=DEVICE) < share
    tokens_per_expert = routing_map.sum(dim=0)
    expert_index, token_index = routing_map.T.nonzero().unbind(dim=1)
    num_pairs = len(token_index)

    counts = plan.count_blocks(routing_map)
    assert torch.equal(counts.sum(dim=1), tokens_per_expert)
    actual, by_token, pair_gates = plan.fill(probs, routing_map, counts, num_pairs)
    assert torch.equal(actual.long(), token_index)
    assert torch.equal(pair_gates, probs[token_index, expert_index])

    # A stable sort of the pairs by token keeps each token's pairs in the order of the experts.
    bounds = torch.cat([routing_map.new_zeros(1, dtype=torch.int64), routing_map.sum(dim=1).cumsum(0)])
    expected = torch.cat([bounds + num_tokens + 1, token_index.sort(stable=True).indices])
    assert torch.equal(by_token.long(), expected)

    direction = torch.randn_like(pair_gates)
    (pair_gates * direction).sum().backward()
    right = torch.zeros_like(probs)
    right[token_index, expert_index] = direction
    assert probs.grad is not None and torch.equal(probs.grad, right)


def test_more_tokens_make_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks grow with the tokens, so that there are at most `MOST_BLOCKS` counts for each expert."""
    monkeypatch.setattr(plan, "MOST_BLOCKS", 2)
    assert plan.count_blocks(torch.ones(100, 3, dtype=torch.bool, device=DEVICE)).shape == (3, 2)
    test_plan(100, 3, 0.4, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "share"),
    [(0, 8, 0.5), (1, 8, 1.0), (4, 8, 0.0), (6, triton.SUM_WIDTH + 5, 0.3), (9, 12, 0.9)],
    ids=["no token", "one token", "no pair", "in parts", "many rows"],
)
def test_sums_are_rounded_once(num_tokens: int, hidden: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    routing_map = torch.rand(num_tokens, 64 if share == 0.9 else 8, device=DEVICE) < share
    token_index = routing_map.T.nonzero()[:, 1]
    pairs = torch.rand(len(token_index), hidden, device=DEVICE).to(dtype)
    order = plan.fill(routing_map.float(), routing_map, plan.count_blocks(routing_map), len(pairs))
    actual = triton.sum_rows(pairs, order[1])
    assert actual.dtype == dtype and torch.equal(actual, triton.sum_rows(pairs, order[1]))
    expected = pairs.new_zeros(num_tokens, hidden, dtype=torch.float64).index_add(0, token_index, pairs.double())
    torch.testing.assert_close(actual.double(), expected, rtol=rounding(dtype) + 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pairs", "ffn"), [(0, 5), (1, 1), (37, 48), (3, swiglu.TILE + 6)], ids=["none", "one", "tiles", "in parts"]
)
def test_swiglu(pairs: int, ffn: int, dtype: torch.dtype) -> None:
    torch.manual_seed(ffn)
    hidden = (3 * torch.randn(pairs, 2 * ffn, device=DEVICE)).to(dtype)
    d_activated = torch.randn(pairs, ffn, device=DEVICE).to(dtype)
    pair_gates = torch.rand(pairs, device=DEVICE)
    exact_hidden, exact_gates = hidden.double().requires_grad_(), pair_gates.double().requires_grad_()
    left, right = exact_hidden.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(left) * right * exact_gates[:, None]
    exact.backward(d_activated.double())

    activated = swiglu.activate(hidden, pair_gates)
    again, d_hidden, d_gates = swiglu.activate_backward(hidden, pair_gates, d_activated)
    assert torch.equal(again, activated) and again.data_ptr() == d_activated.data_ptr()
    # The sum of a gate's gradient can be smaller than the rounding of its terms.
    terms = (torch.nn.functional.silu(left) * right * d_activated).abs().sum(dim=-1)
    values, scales = (exact, exact_hidden.grad, exact_gates.grad), (exact, exact_hidden.grad, terms)
    for actual, expected, scale in zip((activated, d_hidden, d_gates), values, scales, strict=True):
        allowed = (rounding(actual.dtype) + 2e-6) * scale.abs() + 3e-6
        assert ((actual.double() - expected).abs() <= allowed).all()
    assert activated.dtype == d_hidden.dtype == dtype and d_gates.dtype == pair_gates.dtype
