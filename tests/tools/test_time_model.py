"""Test the rehearsal's time model: collectives, products of Transformer Engine, and the host."""

from argparse import Namespace

import pytest
import torch

from tools.plan.rehearse import engine, report
from tools.plan.rehearse.cards import rates
from tools.plan.rehearse.roofline import Roofline, host_seconds, share_of_grouped, step_seconds


def test_collectives_take_their_latency() -> None:
    """Ten all-reduces of 8 GB over 8 ranks of a node send 7/8 of the bytes twice, and each has log2(8) latencies."""
    one = {"kind": "all_reduce", "ranks": 8, "within_node": True, "times": 10, "bytes": 80e9}
    given = {"link": 400.0, "latency": 5.0, "network": 0.0, "network_latency": 0.0}
    (timed,) = report.timed([one, one | {"ranks": 1}], given)
    assert timed["seconds"] == pytest.approx(2 * 70e9 / 400e9 + 10 * 3 * 5e-6)


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(
    ("left", "right", "layout"), [("nk", "mk", "TN"), ("nk", "mn", "NN"), ("mk", "mn", "NT")], ids=["y", "dx", "dw"]
)
def test_work_of_engine_products(left: str, right: str, layout: str, is_grouped: bool) -> None:
    """Output and gradients take 2 · m · k · n FLOPs and one pass over each matrix; accumulation adds one."""
    sizes = {"m": 6, "k": 4, "n": 10}
    shapes = [*(tuple(sizes[letter] for letter in letters) for letters in (left, right)), (10, 4)]
    a, b, out = ([torch.empty(shape)] if is_grouped else torch.empty(shape) for shape in shapes)
    name, work_space = "te_general_grouped_gemm" if is_grouped else "generic_gemm", torch.empty(1000)
    rest = [None, None, None, None, None, None, None, work_space, 1000]
    for accumulate in (False, True):
        arguments = [a, layout[0] == "T", b, layout[1] == "T", out, *rest, accumulate]
        work = engine.work_of(name, arguments, engine.tensors_of(name, arguments, {}, [out]))
        moved = 4 * (sum(x * y for x, y in shapes) + 10 * 4 * accumulate)
        assert work == (moved, 2 * 6 * 4 * 10, "grouped" if is_grouped else "products")


def test_work_of_engine_attention() -> None:
    """Attention has two products forward and five backward; causal attention needs half of each."""
    query, key = torch.empty(8, 2, 4, 16), torch.empty(8, 2, 2, 16)
    for name, products in (("fused_attn_fwd", 2), ("fused_attn_bwd", 5)):
        moved, flops, rate = engine.work_of(name, [8, 8, query, key, key], [query, key])
        assert (moved, rate) == (query.nbytes + key.nbytes, "attention")
        assert flops == products * 2 * (2 * 4 * 8 * 8 * 16) / 2


def test_the_gpu_waits_for_the_host() -> None:
    """Step times match a hand calculation: two stretches of operations with a wait between them."""
    marks = [(0, 0), (1_000_000, 2), (1_000_000, 1_000_002)]
    assert host_seconds(marks, {"frame": 2.0, "launch": 3.0}) == pytest.approx([2.000006, 3.0])
    assert step_seconds([2.0, 3.0], [[5.0, 1.0], [0.5]]) == (1 + 5 + 1) + (3 + 0.5)
    assert step_seconds([2.0], [[0.25, 0.25]]) == 2.25
    assert step_seconds([0.0, 4.0], [[1.0, 1.0], []]) == 2 + 4
    assert step_seconds([1.0, 1.0], [[4.0, 4.0], [1.0]], [1]) == 8.5 + 1, "the first wait leaves an operation running"


def test_small_experts_and_heads_are_slower() -> None:
    """The products of the published layers in cards.py take 8.7 of 10.2 ms and 9.7 of 11.4 ms."""
    for ffn, pairs, seconds in ((768, 32768 * 8, 8.7e-3), (512, 32768 * 10, 9.7e-3)):
        args = Namespace(moe_ffn_hidden_size=ffn, expert_tensor_parallel_size=1, kv_channels=64)
        roofline = Roofline(args, rates("h100"), engine.Calls())
        roofline._add("experts", 0, 6.0 * pairs * 2048 * ffn, "grouped", share_of_grouped(args))
        assert roofline.parts["experts"].seconds == pytest.approx(seconds, rel=0.05)
    roofline._add("attention", 0, 227.5e12, "attention")
    assert roofline.parts["attention"].seconds == pytest.approx(1.0, rel=0.01)
