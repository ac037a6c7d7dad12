"""Test the plan's kernels against PyTorch's nonzero, bit for bit, and the sum over a token's rows against float64."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import plan, triton
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


def check(num_tokens: int, num_experts: int, share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    probs = torch.rand(num_tokens, num_experts, device=DEVICE).to(dtype).requires_grad_()
    routing_map = torch.rand(num_tokens, num_experts, device=DEVICE) < share
    tokens_per_expert = routing_map.sum(dim=0)
    expert_index, token_index = routing_map.T.nonzero().unbind(dim=1)
    num_pairs = len(token_index)

    counts = plan.count_blocks(routing_map)
    assert torch.equal(counts.sum(dim=1), tokens_per_expert)
    actual, by_token, gates = plan.fill(probs, routing_map, counts, num_pairs)
    assert torch.equal(actual.long(), token_index)
    assert torch.equal(gates, probs[token_index, expert_index])

    # A stable sort of the pairs by token keeps each token's pairs in the order of the experts.
    bounds = torch.cat([routing_map.new_zeros(1, dtype=torch.int64), routing_map.sum(dim=1).cumsum(0)])
    expected = torch.cat([bounds + num_tokens + 1, token_index.sort(stable=True).indices])
    assert torch.equal(by_token.long(), expected)

    direction = torch.randn_like(gates)
    (gates * direction).sum().backward()
    right = torch.zeros_like(probs)
    right[token_index, expert_index] = direction
    assert probs.grad is not None and torch.equal(probs.grad, right)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_plan_and_gates(shape: tuple[int, int, float]) -> None:
    check(*shape, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gates_keep_their_type(dtype: torch.dtype) -> None:
    check(7, 5, 0.4, dtype)


def test_more_tokens_make_larger_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks grow with the tokens, so that there are at most `MOST_BLOCKS` counts for each expert."""
    monkeypatch.setattr(plan, "MOST_BLOCKS", 2)
    assert plan.count_blocks(torch.ones(100, 3, dtype=torch.bool, device=DEVICE)).shape == (3, 2)
    check(100, 3, 0.4, torch.float32)


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
