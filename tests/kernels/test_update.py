"""The update's kernel against loops over layers."""

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.kernels.update import decide
from megatron.remoe.routing.counts import RoutingCounts
from tests.kernels.compiled import Kernel, usages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
READ = ("tokens_per_expert", "tokens", "l1_loss", "not_finite", "guarded", "l1_exponent", "routers")
TOPK, LEAST = 2, 0.02


def random_counts(layers: int, experts: int, exponent: int = -7) -> RoutingCounts:
    """Two ranks' counts of 100 tokens, with a dying layer, one that is guarded, and one without a router."""
    counts = RoutingCounts.zeros(experts, DEVICE, layers)
    counts["tokens_per_expert"].copy_(torch.randint(0, 90, (layers, experts)))
    for name, value in {"tokens": 100.0, "l1_loss": 0.5, "routers": 2.0, "l1_exponent": 2.0 * exponent}.items():
        counts[name].fill_(value)
    counts["guarded"][0] = 2.0
    counts["tokens_per_expert"][-1] = 0.0
    counts["tokens_per_expert"][-1, 0] = 1.0
    counts.table[layers // 2] = 0.0
    return counts


def expected(counts: RoutingCounts) -> tuple[int, list[int]]:
    rows = [
        dict(zip(READ, values, strict=True)) for values in zip(*(counts[name].tolist() for name in READ), strict=True)
    ]
    routers = sum(row["routers"] for row in rows)
    exponent = sum(row["l1_exponent"] for row in rows) / max(routers, 1)
    if not torch.isfinite(counts.table).all():
        return exponent, [int(row["guarded"] > 0) for row in rows]
    surplus = sum(sum(row["tokens_per_expert"]) - TOPK * row["tokens"] for row in rows)
    dying = [int(sum(row["tokens_per_expert"]) < LEAST * row["tokens"]) for row in rows]
    return exponent + (surplus > 0) - (surplus < 0), dying


def found(counts: RoutingCounts) -> tuple[int, list[int]]:
    exponent, guarded = decide(*(counts[name] for name in READ), TOPK, LEAST)
    assert exponent.dtype == guarded.dtype == torch.int64
    return exponent.item(), guarded.tolist()


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (3, 4), (12, 8), (24, 7), (30, 512), (94, 130)])
def test_as_counted(layers: int, experts: int) -> None:
    torch.manual_seed(layers)
    counts = random_counts(layers, experts)
    assert found(counts) == expected(counts)


def test_below_and_on_the_target() -> None:
    counts = random_counts(4, 8)
    for share, step in ((0.0, -1), (TOPK * 100 / 8, 0), (99.0, 1)):
        counts["tokens_per_expert"].fill_(share)
        counts["tokens"].fill_(100.0)
        assert found(counts) == expected(counts) and found(counts)[0] == -7 + step


@pytest.mark.parametrize("name", ["l1_loss", "not_finite"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_moves_nothing(name: str, value: float) -> None:
    counts = random_counts(5, 3)
    counts[name][1] = value
    assert found(counts) == expected(counts) == (-7, [1, 0, 0, 0, 0])


def test_no_router_on_any_rank() -> None:
    assert found(RoutingCounts.zeros(4, DEVICE, 2)) == (0, [0, 0])


def test_compiled_without_spills() -> None:
    given = {f"{name}_L": "*fp64" for name in ("tokens", "l1_loss", "not_finite", "guarded", "exponent", "routers")}
    given |= {"pairs_LE": "*fp64", "exponent": "*i64", "guards_L": "*i64", "stride": "i32"}
    sizes = [(12, 16, 8, 8), (24, 32, 512, 128)]
    kernels = [
        Kernel("update:_decide", given, {"L": L, "HEIGHT": height, "E": E, "WIDTH": width, "TOPK": 1, "LEAST": 1e-3})
        for L, height, E, width in sizes
    ]
    assert not any(usage.spilled for usage in usages(kernels))
