"""Test SwiGLU with gates, and its gradients, against autograd in float64."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels import swiglu
from tests.kernels import DEVICE, rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("pairs", "ffn"), [(0, 5), (1, 1), (37, 48), (3, swiglu.TILE + 6)], ids=["none", "one", "tiles", "in parts"]
)
def test_values_and_gradients(pairs: int, ffn: int, dtype: torch.dtype) -> None:
    torch.manual_seed(ffn)
    hidden = (3 * torch.randn(pairs, 2 * ffn, device=DEVICE)).to(dtype)
    d_activated = torch.randn(pairs, ffn, device=DEVICE).to(dtype)
    gates = torch.rand(pairs, device=DEVICE)
    exact_hidden, exact_gates = hidden.double().requires_grad_(), gates.double().requires_grad_()
    left, right = exact_hidden.chunk(2, dim=-1)
    exact = torch.nn.functional.silu(left) * right * exact_gates[:, None]
    exact.backward(d_activated.double())

    activated = swiglu.activate(hidden, gates)
    again, d_hidden, d_gates = swiglu.activate_backward(hidden, gates, d_activated)
    assert torch.equal(again, activated) and again.data_ptr() == d_activated.data_ptr()
    # The sum of a gate's gradient can be smaller than the rounding of its terms.
    terms = (torch.nn.functional.silu(left) * right * d_activated).abs().sum(dim=-1)
    values, scales = (exact, exact_hidden.grad, exact_gates.grad), (exact, exact_hidden.grad, terms)
    for actual, expected, scale in zip((activated, d_hidden, d_gates), values, scales, strict=True):
        allowed = (rounding(actual.dtype) + 2e-6) * scale.abs() + 3e-6
        assert ((actual.double() - expected).abs() <= allowed).all()
    assert activated.dtype == d_hidden.dtype == dtype and d_gates.dtype == gates.dtype
