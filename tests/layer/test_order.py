"""Test that a token's pairs are added up in fp32 and rounded once."""

import pytest
import torch

from megatron.remoe.kernels.pytorch import TokenOrder
from tests.layers import SumTypes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_token", [64, 7])
def test_sums_in_half_precision_are_rounded_once(per_token: int, dtype: torch.dtype) -> None:
    """With granularity 64 a token has 64 summands: in bf16 each would be rounded to the sum's 8 bits."""
    torch.manual_seed(per_token)
    rows = torch.arange(5, device=DEVICE).repeat(per_token)
    pairs = torch.rand(len(rows), 16, device=DEVICE).to(dtype)
    right = pairs.double().view(per_token, 5, 16).sum(dim=0)
    with SumTypes() as sums:
        actual = TokenOrder(rows).sum(pairs, 5)
    assert actual.dtype == dtype and sums.seen == {torch.float32}
    torch.testing.assert_close(actual.double(), right, rtol=0.51 * torch.finfo(dtype).eps, atol=0)
