"""Test the router's kernels against the paper's equations in float64, and that they compile without spills."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.remoe.kernels import router
from megatron.remoe.kernels.backend import Regularization
from tests.kernels.compiled import Kernel, usages

pytestmark = pytest.mark.usefixtures("process_groups")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOPK, INIT, MULTIPLIER, GUARD, EXPONENT, SCALE = 2, 1e-3, 1.2, 0.1, 11, 0.375


def route(logits, padding=None, guarded=0, balances=True, per_token=False):
    """Return the gates, the map and the row of counts that the kernels compute."""
    buffers = [torch.tensor(value, device=DEVICE) for value in (EXPONENT, guarded)]
    counts = torch.full((logits.shape[1] + 7,), 3.0, dtype=torch.float64, device=DEVICE)
    settings = Regularization(TOPK, INIT, MULTIPLIER, GUARD, balances)
    world = torch.distributed.group.WORLD
    return *router.relu_routing(settings, logits, padding, *buffers, counts, world, per_token), counts - 3.0


def expected(logits, upstream, padding=None, guarded=0, balances=True, per_token=False):
    """Return gates, map, counts and the gradient of the logits, in float64."""
    logits = logits.detach().double().requires_grad_()
    num_tokens, num_experts = logits.shape
    is_token = torch.ones(num_tokens, dtype=torch.bool, device=DEVICE) if padding is None else ~padding
    routing_map = (logits > 0) & is_token[:, None]
    gates = logits * routing_map
    pairs, tokens = routing_map.sum(dim=0), max(int(is_token.sum()), 1)
    load = num_experts / (TOPK * tokens) * pairs if balances else torch.ones_like(pairs)
    l1_loss = (load * gates).sum() / tokens
    pushed = -GUARD * (logits * ~routing_map).sum() / (tokens * num_experts)
    term = INIT * MULTIPLIER**EXPONENT * (1 - guarded) * l1_loss + guarded * pushed
    weight = int(is_token.sum()) if per_token else 1
    ((gates * upstream.double()).sum() + SCALE * weight * term).backward()
    tail = torch.tensor([int(is_token.sum()), l1_loss.item(), 1.0, 0.0, 0.0, 0.0, 0.0], device=DEVICE)
    return gates.detach(), routing_map, torch.cat([pairs, tail]), logits.grad


@pytest.fixture(autouse=True)
def scale():
    """Set the loss scale, as Megatron does between forward and backward."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), SCALE, device=DEVICE))
    yield
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=DEVICE))


def check(logits: torch.Tensor, padded: float = 0.0, **settings) -> None:
    """Compare the kernels with the equations: gradients and L1 loss up to rounding, the rest exactly."""
    padding = torch.rand(len(logits), device=DEVICE) < padded if padded else None
    upstream = torch.randn_like(logits)
    gates, routing_map, counts, gradient = expected(logits, upstream, padding, **settings)
    logits.requires_grad_()
    probs, found_map, found_counts = route(logits, padding, **settings)
    probs.backward(upstream)
    assert torch.equal(probs, gates.to(logits.dtype)) and torch.equal(found_map, routing_map)
    loss = logits.shape[1] + 1
    torch.testing.assert_close(found_counts[loss], counts[loss], rtol=1e-6, atol=1e-12, check_dtype=False)
    found_counts[loss] = counts[loss]
    assert torch.equal(found_counts, counts)
    rtol = 2**-7 if logits.dtype == torch.bfloat16 else 1e-6  # the interpreter truncates, a GPU rounds
    torch.testing.assert_close(logits.grad, gradient.to(logits.dtype), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(1, 1), (0, 4), (1, 8), (37, 5), (300, 8), (2100, 3), (40, 512)]
)
def test_shapes_and_types(num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(num_tokens)
    check(torch.randn(num_tokens, num_experts, device=DEVICE).to(dtype))


@pytest.mark.parametrize("padded", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("guarded", [0, 1])
@pytest.mark.parametrize("balances", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_padding_guard_and_weights(padded: float, guarded: int, balances: bool, per_token: bool) -> None:
    torch.manual_seed(1)
    check(torch.randn(50, 6, device=DEVICE), padded, guarded=guarded, balances=balances, per_token=per_token)


def test_gates_without_a_gradient() -> None:
    """The L1 term has a gradient even if what uses the gates has none."""

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, probs):
            return probs.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    logits = torch.randn(20, 4, device=DEVICE, requires_grad=True)
    Cut.apply(route(logits)[0]).sum().backward()
    *_, gradient = expected(logits, torch.zeros_like(logits))
    torch.testing.assert_close(logits.grad, gradient.float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
@pytest.mark.parametrize("guarded", [0, 1])
def test_all_off_and_all_on(shift: float, guarded: int) -> None:
    torch.manual_seed(2)
    check(torch.randn(70, 4, device=DEVICE) + shift, guarded=guarded)


def test_what_is_not_finite_is_not_routed_and_can_be_told() -> None:
    logits = torch.tensor([[float("nan"), 1.0], [float("inf"), -1.0]], device=DEVICE)
    probs, routing_map, counts = route(logits)
    assert routing_map.tolist() == [[False, True], [True, False]] and probs.tolist() == [
        [0.0, 1.0],
        [float("inf"), 0.0],
    ]
    assert counts[3] == float("inf")


def test_without_a_loss_scale_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
    logits = torch.tensor([[2.0, -1.0]], device=DEVICE, requires_grad=True)
    route(logits, balances=False)[0].sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0 + INIT * MULTIPLIER**EXPONENT, 0.0]], device=DEVICE))


def test_compiled_without_spills() -> None:
    kernels = []
    for num_experts, dtype, wide in ((8, "*bf16", False), (512, "*bf16", True)):
        logits = {name: dtype for name in ("logits_TE", "probs_TE")}
        padding = {"padding_T": "*i1"} if wide else {}
        size = {"E": num_experts, "BLOCK": 4 if wide else 128, "WIDTH": num_experts}
        counted = {"map_TE": "*i1", "pairs_PC": "*i32", "sums_PE": "*fp32"}
        constants = size if wide else size | {"padding_T": None}
        kernels.append(
            Kernel("router:_gates", logits | padding | counted | {"num_tokens": "i32", "span": "i32"}, constants)
        )
        given = {"pairs_PC": "*i32", "sums_PE": "*fp32", "exponent": "*i64", "guarded": "*i64", "programs": "i32"}
        given |= {"counts": "*fp64", "terms_C": "*fp32"} | ({"of_sequence_C": "*i64"} if wide else {})
        constants = {"TOPK": 1, "RANKS": 2, "BALANCES": True, "INIT": 1e-8, "LOG2": 0.263, "GUARD": GUARD}
        constants |= {"E": num_experts, "PER_TOKEN": wide, "BLOCK": 16 if wide else 128, "WIDTH": num_experts}
        constants |= {} if wide else {"of_sequence_C": None}
        kernels.append(Kernel("router:_terms", given, constants, num_warps=router.TERMS_WARPS))
        given = {"d_probs_TE": dtype, "map_TE": "*i1", "terms_C": "*fp32", "scale": "*fp32", "d_logits_TE": dtype}
        kernels.append(Kernel("router:_gradient", given | {"size": "i32"}, {"E": num_experts, "BLOCK": router.BLOCK}))
    # Triton 3.6 lets the one program of _terms spill two registers with 512 experts on sm_80, which costs nothing.
    assert all(usage.spilled <= 8 * usage.name.endswith(":_terms") for usage in usages(kernels))
