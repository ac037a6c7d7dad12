"""Test the sum over a token's rows against a sum in float64."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import plan, triton
from tests.kernels import DEVICE, rounding


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
