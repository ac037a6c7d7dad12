"""Fit routers that keep a layer's output."""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

# Measured for 8 copies on 8,192 random inputs of 64 numbers: half or twice of one of these four, or of BALANCE, changes
# the relative error of the gates (0.056) by less than 0.002 and the sparsity (0.15) by less than 0.012.
STEPS = 800
TOKENS_PER_STEP = 4096
LEARNING_RATE = 0.2  # in units of the root mean square of the weights at the start
RIDGE = 0.1  # in units of the inputs' mean square: directions with less are not scaled up to the size of the others
# Weights of two terms for sums of gates: give all experts the same share, and each token few of them.
BALANCE = 0.1  # without it, one copy gets nearly all of the sum
CONCENTRATION = 0.05  # 0, 0.05 and 0.1 have errors of 0.051, 0.056 and 0.068, and sparsities of 0.10, 0.15 and 0.22


class Fit(NamedTuple):
    """A fitted router.

    Attributes:
        weights: `[num_experts, hidden]` in the dtype of the inputs.
        scale: factor on normalized gates; 1 for others.
        error: root mean square of the difference between the gates and their targets, relative to the targets'.
        sparsity: share of inactive (token, expert) pairs.
    """

    weights: torch.Tensor
    scale: float
    error: float
    sparsity: float


def fit_router(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    copies: int = 1,
    start: torch.Tensor | None = None,
    seed: int = 0,
    normalizes: bool = False,
) -> Fit:
    """Find a router whose gates ReLU(x Wᵀ) approximate given ones.

    If experts are copies of each other, only the sum of their gates counts. The fit then gives every copy the same
    share over all tokens, and every token few of the copies.

    The router has no bias. Gates that are off for some tokens fit a constant much better than one linear direction.

    Args:
        inputs: `[tokens, hidden]`, of the router.
        targets: `[tokens, num_experts / copies]`, the wanted sum of the gates of each expert's copies.
        copies: number of equal experts; expert e is a copy of number `e // copies`.
        start: `[num_experts, hidden]`, weights to start from, up to a factor (None: random).
        seed: of the random weights and of the tokens' order.
        normalizes: the gates are a scale times ReLU(x Wᵀ / ‖x Wᵀ‖).
    """
    generator = torch.Generator().manual_seed(seed)
    functions = targets.shape[1]
    root, whitened = _whiten(inputs)
    first = _draw_weights(whitened, functions * copies, generator) if start is None else start.to(inputs.dtype) @ root
    compute = partial(_compute_gates, normalizes=normalizes)
    weight = first if normalizes else first * _best_factor(compute(whitened, first), targets, copies)
    weight = weight.detach().requires_grad_()
    scale = targets.square().sum(dim=1).mean()
    optimizer = torch.optim.Adam([weight], lr=LEARNING_RATE * float(weight.detach().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(inputs), (min(TOKENS_PER_STEP, len(inputs)),), generator=generator)
        gates = compute(whitened[chosen], weight)
        if normalizes:
            gates = gates * _best_factor(gates, targets[chosen], copies)
        objective = (_sum_copies(gates, copies) - targets[chosen]).square().sum(dim=1).mean() / scale
        if copies > 1:
            uneven = copies * gates.mean(dim=0).square().sum() / scale
            concentrated = gates.square().sum(dim=1).mean() / scale
            objective = objective + BALANCE * uneven - CONCENTRATION * concentrated
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
    fitted = weight.detach()
    gates = compute(whitened, fitted)
    factor = _best_factor(gates, targets, copies)
    gates = gates * factor
    error = (_sum_copies(gates, copies) - targets).square().sum(dim=1).mean() / scale
    weights = torch.linalg.solve_triangular(root.T, fitted.T, upper=True).T.contiguous()
    sparsity = 1.0 - float((gates > 0).double().mean())
    if normalizes:
        return Fit(weights, float(factor), float(error.sqrt()), sparsity)
    return Fit(weights * factor, 1.0, float(error.sqrt()), sparsity)


def _compute_gates(inputs: torch.Tensor, weight: torch.Tensor, normalizes: bool) -> torch.Tensor:
    """Return the gates `[tokens, num_experts]`, without scale."""
    logits = inputs @ weight.T
    return torch.relu(normalize(logits, dim=1) if normalizes else logits)


def _whiten(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coordinates in which the inputs' directions have about the same size.

    The part that all tokens share may be much larger than their differences. In the original coordinates, a step along
    it would switch experts on or off for all tokens.

    Returns:
        L `[hidden, hidden]`, lower triangular, and z `[tokens, hidden]` with x = L z.
    """
    moments = inputs.T @ inputs / len(inputs)
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    root = torch.linalg.cholesky(moments)
    return root, torch.linalg.solve_triangular(root, inputs.T, upper=False).T.contiguous()


def _draw_weights(inputs: torch.Tensor, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Return random weights `[experts, hidden]` whose logits have the same mean and about the same variance."""
    mean = inputs.mean(dim=0)
    directions = torch.randn(experts, inputs.shape[1], generator=generator, dtype=inputs.dtype)
    directions -= torch.outer(directions @ mean, mean) / mean.square().sum()
    return mean + directions / directions.norm(dim=1, keepdim=True)


def _sum_copies(gates: torch.Tensor, copies: int) -> torch.Tensor:
    """Sum the gates of each expert's copies: `[tokens, num_experts]` → `[tokens, num_experts / copies]`."""
    return gates.view(len(gates), -1, copies).sum(dim=2)


def _best_factor(gates: torch.Tensor, targets: torch.Tensor, copies: int) -> torch.Tensor:
    """Return the factor on `gates` that brings the sums of gates closest to their targets, by least squares."""
    sums = _sum_copies(gates, copies)
    return (sums * targets).sum() / sums.square().sum().clamp(min=torch.finfo(sums.dtype).tiny)
