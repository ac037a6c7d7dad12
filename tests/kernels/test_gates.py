"""Test ReLU with its map and sums, and its gradient, against PyTorch's operations."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import gates, pytorch
from tests.kernels import DEVICE, rounding


def check(logits: torch.Tensor) -> None:
    """Compare the results: sums and gradients up to rounding, the rest exactly."""
    probs, routing_map, counts, sums = gates.gate(logits)
    right_probs, right_map, right_counts, right_sums = pytorch.gate(logits)
    assert torch.equal(probs, right_probs) and torch.equal(routing_map, right_map)
    assert torch.equal(counts.sum(dim=1), right_counts.sum(dim=1))
    torch.testing.assert_close(sums, right_sums, rtol=1e-6, atol=1e-6)
    d_probs, on, off = torch.randn_like(logits), torch.rand(logits.shape[1], device=DEVICE), torch.ones(1) / 3
    actual, right = (one.gate_backward(d_probs, routing_map, on, off.to(DEVICE)).double() for one in (gates, pytorch))
    torch.testing.assert_close(actual, right, rtol=2 * rounding(logits.dtype), atol=rounding(logits.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (1, 8), (37, 5), (2100, 3), (40, 512)], ids=str)
def test_shapes_and_types(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(shape[0])
    check(torch.randn(shape, device=DEVICE).to(dtype))


@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_all_off_and_all_on(shift: float) -> None:
    torch.manual_seed(1)
    check(torch.randn(50, 6, device=DEVICE) + shift)


def test_nonfinite_logits() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [float("inf"), -1.0]], device=DEVICE)
    probs, routing_map, _, sums = gates.gate(logits)
    assert routing_map.tolist() == [[False, True], [True, False]]
    assert probs.tolist() == [[0.0, 1.0], [float("inf"), 0.0]] and sums.tolist() == [float("inf"), 1.0]
