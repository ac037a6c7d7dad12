"""Test the experts' products against plain autograd in float64, for any number of experts and rows.

Fake tensors show what each kind of GPU would run. They have the checks of its kernels but no values, so a test fails
if the code waits for a value.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron.remoe.kernels.pytorch import PYTORCH, SortedPairs, TokenOrder
from megatron.remoe.layer import grouped_swiglu as module
from megatron.remoe.layer.grouped_swiglu import OneByOne, OneKernel, _GroupedSwiGLU, grouped_swiglu
from tests.kernels import DEVICE
from tests.layers import Watch

SIZES = {"no rows": [0, 0, 0], "few rows": [3, 0, 1, 64], "many rows": [10, 100, 100, 0, 255, 1, 1, 65, 400, 0]}
WAYS = [(OneByOne, torch.float64, 1e-10), (OneByOne, torch.bfloat16, 0.01), (OneKernel, torch.bfloat16, 0.01)]


def one_by_one(tokens, gates, fc1, fc2, sizes: list[int], rows: torch.Tensor | None) -> torch.Tensor:
    outputs, pairs = [], tokens if rows is None else tokens[rows]
    for x, gate, first, second in zip(pairs.split(sizes), gates.split(sizes), fc1, fc2, strict=True):
        left, right = (x @ first.T).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(left) * right * gate[:, None]) @ second.T)
    output = torch.cat(outputs)
    return output if rows is None else torch.zeros_like(tokens).index_add(0, rows, output)


def some_rows(sizes: list[int], gathers: bool) -> tuple[int, torch.Tensor | None]:
    """Return the number of tokens, and the token of each pair, sorted by expert; None for these if tokens are pairs."""
    num_tokens = max(sizes) + 3
    rows = [torch.randperm(num_tokens, device=DEVICE)[:size].sort().values for size in sizes]
    return (num_tokens, torch.cat(rows)) if gathers else (sum(sizes), None)


@pytest.mark.parametrize("gathers", [False, True], ids=["pairs", "tokens and rows"])
@pytest.mark.parametrize("accumulates", [False, True], ids=["new gradients", "main_grad"])
@pytest.mark.parametrize(("kind", "dtype", "near"), WAYS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(sizes: list[int], kind, dtype: torch.dtype, near: float, accumulates, gathers) -> None:
    """Results equal those in float64, both with `grouped_mm`, which is one kernel on some GPUs, and without it."""
    if kind is OneKernel and not any(sizes):
        pytest.skip("is not called without rows")
    products = OneKernel(sizes, torch.device(DEVICE)) if kind is OneKernel else OneByOne(sizes)
    torch.manual_seed(len(sizes))
    hidden, ffn = 32, 24  # the kernel needs rows of a multiple of 16 bytes
    num_tokens, rows = some_rows(sizes, gathers)
    order = SortedPairs() if rows is None else TokenOrder(rows)
    options = {"dtype": dtype, "device": DEVICE}
    inputs = [torch.randn(num_tokens, hidden, **options), torch.rand(sum(sizes), **options)]
    inputs += [0.2 * torch.randn(len(sizes), *shape, **options) for shape in ((2 * ffn, hidden), (hidden, ffn))]
    ours = [value.clone().requires_grad_() for value in inputs[:2]] + [torch.nn.Parameter(w) for w in inputs[2:]]
    right = [value.double().requires_grad_() for value in inputs]
    # Megatron's buffers are fp32. Only a GPU can add bf16 products to them.
    buffers = torch.float32 if DEVICE == "cuda" and dtype == torch.bfloat16 else dtype
    for weight in ours[2:] if accumulates else ():
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight, dtype=buffers), False
    # Values show less than the types of sums, because a CPU rounds less often.
    with Watch(lambda name, given: given[0].dtype if name.startswith("index_add") else None) as sums:
        output = _GroupedSwiGLU.apply(*ours[:2], products, order, PYTORCH, *ours[2:])
        direction = torch.randn_like(output)
        (output * direction).sum().backward()
    assert torch.bfloat16 not in sums.seen and bool(sums.seen) == (gathers and any(sizes))
    expected = one_by_one(*right, sizes, rows)
    (expected * direction.double()).sum().backward()
    pairs = [(output, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(ours, right, strict=True))]
    if accumulates:
        assert all(weight.grad_added_to_main_grad for weight in ours[2:])
        pairs[3:] = [(mine.main_grad, theirs.grad + 1) for mine, theirs in zip(ours[2:], right[2:], strict=True)]
    for mine, theirs in pairs:
        assert (mine.detach().double() - theirs.detach()).norm() <= near * theirs.detach().norm()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[tuple[int, int]], None]]:
    """Yield a function that sets the compute capability of every GPU."""

    def be(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda _device: capability)
        module._generation.cache_clear()

    yield be
    module._generation.cache_clear()


def run_on_fake_gpu(sizes: list[int]) -> type:
    """Run forward and backward passes over 7 tokens; return the type of the products."""
    experts, hidden, ffn, options = len(sizes), 16, 8, {"dtype": torch.bfloat16, "device": "cuda:0"}
    tokens, gates = torch.empty(7, hidden, **options, requires_grad=True), torch.empty(sum(sizes), **options)
    fc1 = torch.nn.Parameter(torch.empty(experts, 2 * ffn, hidden, **options))
    fc2 = torch.nn.Parameter(torch.empty(experts, hidden, ffn, **options))
    rows = torch.empty(sum(sizes), dtype=torch.int64, device="cuda:0")
    output = grouped_swiglu(tokens, gates, fc1, fc2, sizes, TokenOrder(rows), PYTORCH)
    with torch.no_grad():  # called directly: autograd would start a thread for a GPU that does not exist
        gradients = _GroupedSwiGLU.backward(output.grad_fn, torch.empty_like(output))
        actual = [gradient for gradient in gradients if gradient is not None]
    inputs = (tokens, gates, fc1, fc2)
    assert [(g.shape, g.dtype, g.device) for g in actual] == [(x.shape, x.dtype, x.device) for x in inputs]
    return type(output.grad_fn.products)


@pytest.mark.parametrize(("capability", "dtype", "sizes", "is_one_kernel"), [
    ((7, 5), torch.float16, (3, 16, 8), False),
    ((8, 9), torch.bfloat16, (3, 16, 8), False),
    ((9, 0), torch.bfloat16, (3, 16, 8), True),
    ((9, 0), torch.float32, (3, 16, 8), False),
    ((10, 3), torch.bfloat16, (1023, 16, 8), True),
    ((12, 0), torch.bfloat16, (3, 16, 8), False),
    ((9, 0), torch.bfloat16, (3, 20, 8), False),
    ((9, 0), torch.bfloat16, (3, 16, 12), False),
    ((9, 0), torch.bfloat16, (1024, 16, 8), False),
], ids=str)  # fmt: skip
def test_kernels_of_gpus(pretend, capability: tuple[int, int], dtype: torch.dtype, sizes, is_one_kernel: bool) -> None:
    """`grouped_mm` is one kernel on capabilities 9 and 10 in bf16, up to 1023 experts and for multiples of 8."""
    pretend(capability)
    experts, hidden, ffn = sizes
    with FakeTensorMode():
        weight = torch.empty(experts, 2 * ffn, hidden, dtype=dtype, device="cuda:0")
        assert module.supports_grouped_kernel(weight) is is_one_kernel


@pytest.mark.parametrize("sizes", [[3, 0, 2], [0, 0, 0]], ids=str)
def test_on_a_gpu_with_a_kernel(pretend, sizes: list[int]) -> None:
    """Without rows `grouped_mm` is not called, because it can fail or hang."""
    pretend((9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert run_on_fake_gpu(sizes) is (OneKernel if sum(sizes) else OneByOne)


def test_experts_without_pairs_have_no_gradient_on_sm100(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of sm100 does not write the gradients of these experts; here their memory holds NaN."""
    monkeypatch.setattr(module, "_generation", lambda _device: module.SM100)
    stock, sizes = torch.nn.functional.grouped_mm, torch.tensor([3, 0, 4, 0])

    def leaves_memory(left: torch.Tensor, right: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        product = stock(left, right, offs=offs)
        if product.dim() == 3:
            product[sizes == 0] = torch.nan
        return product

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", leaves_memory)
    left, right = (torch.randn(7, width, dtype=torch.bfloat16) for width in (16, 8))
    actual = OneKernel(sizes.tolist(), torch.device("cpu")).outers(left, right)
    assert not actual[sizes == 0].any() and actual[sizes > 0].all()
    torch.testing.assert_close(actual[0], left[:3].T @ right[:3])
