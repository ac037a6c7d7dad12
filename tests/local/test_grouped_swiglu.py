"""The experts' products against plain autograd, in float64, for blocks of any number of experts and rows."""

import pytest
import torch

from megatron.remoe.local.blocked_swiglu import BLOCK_PAIRS, FEW_PAIRS
from megatron.remoe.local.grouped_swiglu import _GroupedSwiGLU, grouped_swiglu

HIDDEN, FFN = 6, 5
SIZES = {
    "no rows": [0, 0, 0],
    "few rows": [3, 0, 1, FEW_PAIRS],
    "one expert": [7],
    "blocks of one": [BLOCK_PAIRS + 1, BLOCK_PAIRS, 0, BLOCK_PAIRS + 44],
    "blocks of both kinds": [10, 100, 100, 0, BLOCK_PAIRS - 1, 1, 1, FEW_PAIRS + 1, 400, 0],
    "small ones after a large one": [BLOCK_PAIRS, 0, 0, 20, BLOCK_PAIRS - 20, 5],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


both_gradients = pytest.mark.parametrize("accumulates", [False, True], ids=["new gradients", "main_grad"])
both_orders = pytest.mark.parametrize("gathers", [False, True], ids=["pairs", "tokens and rows"])


def one_by_one(
    tokens: torch.Tensor,
    gates: torch.Tensor,
    fc1: torch.Tensor,
    fc2: torch.Tensor,
    sizes: list[int],
    rows: torch.Tensor | None,
) -> torch.Tensor:
    outputs, pairs = [], tokens if rows is None else tokens[rows]
    for x, gate, first, second in zip(pairs.split(sizes), gates.split(sizes), fc1, fc2, strict=True):
        left, right = (x @ first.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(left) * right * gate[:, None]) @ second.T)
    output = torch.cat(outputs)
    return output if rows is None else torch.zeros_like(tokens).index_add(0, rows, output)


def some_rows(sizes: list[int], gathers: bool) -> tuple[int, torch.Tensor | None]:
    """A number of tokens, and which of them, in turn, each expert takes."""
    num_tokens = max(sizes) + 3
    rows = [torch.randperm(num_tokens, device=DEVICE)[:size].sort().values for size in sizes]
    return (num_tokens, torch.cat(rows)) if gathers else (sum(sizes), None)


@both_orders
@both_gradients
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(sizes: list[int], accumulates: bool, gathers: bool) -> None:
    torch.manual_seed(len(sizes))
    num_tokens, rows = some_rows(sizes, gathers)
    options = {"dtype": torch.float64, "device": DEVICE}
    inputs = [torch.randn(num_tokens, HIDDEN, **options), torch.rand(sum(sizes), **options)]
    inputs += [torch.randn(len(sizes), 2 * FFN, HIDDEN, **options), torch.randn(len(sizes), HIDDEN, FFN, **options)]
    ours, right = ([value.clone().requires_grad_() for value in inputs] for _ in range(2))
    ours[2:] = [torch.nn.Parameter(weight) for weight in ours[2:]]
    if accumulates:
        for weight in ours[2:]:
            weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    output = grouped_swiglu(*ours, torch.tensor(sizes), rows)
    expected = one_by_one(*right, sizes, rows)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for number, (mine, theirs) in enumerate(zip(ours, right, strict=True)):
        gradient = mine.main_grad - 1 if accumulates and number >= 2 else mine.grad
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-10, atol=1e-10)


@both_orders
@both_gradients
@pytest.mark.parametrize("sizes", [SIZES["few rows"], SIZES["blocks of both kinds"]], ids=["few rows", "many"])
def test_the_kernel_for_half_precision(sizes: list[int], accumulates: bool, gathers: bool) -> None:
    """What a GPU runs in bf16, here through PyTorch's `grouped_mm` for CPUs."""
    torch.manual_seed(len(sizes))
    hidden, ffn = 32, 24  # the kernel wants rows of a multiple of 16 bytes
    num_tokens, rows = some_rows(sizes, gathers)
    options = {"dtype": torch.bfloat16, "device": DEVICE}
    inputs = [torch.randn(num_tokens, hidden, **options), torch.rand(sum(sizes), **options)]
    inputs += [0.2 * torch.randn(len(sizes), 2 * ffn, hidden, **options)]
    inputs += [0.2 * torch.randn(len(sizes), hidden, ffn, **options)]
    ours = [value.clone().requires_grad_() for value in inputs[:2]] + [torch.nn.Parameter(w) for w in inputs[2:]]
    right = [value.double().requires_grad_() for value in inputs]
    if accumulates:
        for weight in ours[2:]:
            weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    ends = torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32)
    output = _GroupedSwiGLU.apply(*ours, ends, rows, True)
    expected = one_by_one(*right, sizes, rows)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction.double()).sum().backward()

    def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
        return float((mine.detach().double() - theirs.detach()).norm() / theirs.detach().norm())

    assert apart(output, expected) < 0.01
    for number, (mine, theirs) in enumerate(zip(ours, right, strict=True)):
        if accumulates and number >= 2:
            assert mine.grad_added_to_main_grad and apart(mine.main_grad, theirs.grad + 1) < 0.01
        else:
            assert apart(mine.grad, theirs.grad) < 0.01
