"""Test that routers can be fitted to given gates."""

import pytest
import torch

from tools.models.convert.fitting import fit_router


def normed_inputs(common: float) -> torch.Tensor:
    """Return `[6000, 32]` vectors of equal length, as after a norm; their shared part is `common` times the rest."""
    generator, tokens, hidden = torch.Generator().manual_seed(3), 6000, 32
    inputs = torch.randn(tokens, hidden, generator=generator) + common * torch.randn(hidden, generator=generator)
    return torch.nn.functional.normalize(inputs, dim=1) * hidden**0.5


@pytest.mark.parametrize(
    ("common", "bound", "normalizes"), [(0.0, 0.25, False), (1.0, 0.1, False), (10.0, 0.05, False), (1.0, 0.15, True)]
)
def test_gates_of_copies_add_up_to_one(common: float, bound: float, normalizes: bool) -> None:
    inputs = normed_inputs(common)
    fit = fit_router(inputs, torch.ones(len(inputs), 2), copies=8, seed=5, normalizes=normalizes)
    weight, scale, error, sparsity = fit
    logits = inputs @ weight.T
    gates = scale * torch.relu(logits / logits.norm(dim=1, keepdim=True) if normalizes else logits)
    sums = gates.view(len(inputs), 2, 8).sum(dim=2)
    assert (sums - 1).square().mean().sqrt() == pytest.approx(error, rel=1e-3)
    assert error < bound
    assert sparsity == pytest.approx(float((gates == 0).float().mean()), abs=1e-4)
    # No copy is unused, and none dominates.
    assert gates.mean(dim=0) == pytest.approx(1 / 8, rel=0.2)
    assert (gates > 0).float().mean(dim=0).min() > 0.3
    assert gates.std(dim=0).min() > 0.01


def test_gates_of_another_router_are_found() -> None:
    inputs = normed_inputs(common=1.0)
    wanted = torch.randn(8, 32, generator=torch.Generator().manual_seed(4)) / 10
    off = wanted + torch.randn(8, 32, generator=torch.Generator().manual_seed(6)) / 30
    weight, _, error, _ = fit_router(inputs, torch.relu(inputs @ wanted.T), start=7 * off)
    assert error < 0.02
    torch.testing.assert_close(weight, wanted, rtol=0, atol=0.02)
