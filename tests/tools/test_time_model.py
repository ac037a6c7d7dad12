"""Test the rehearsal's time model: collectives, products of Transformer Engine, and the host."""

from argparse import Namespace

import pytest
import torch

from tools.plan import roofline as engine
from tools.plan.gpus import rates
from tools.plan.step_time import StepTime, collective_seconds, conclude, grouped_share, host_seconds, waiting_seconds


def test_collectives_take_their_latency() -> None:
    """Ten all-reduces of 8 GB over 8 ranks of a node send 7/8 of the bytes twice, and each has log2(8) latencies."""
    one = {"kind": "all_reduce", "ranks": 8, "within_node": True, "times": 10, "bytes": 80e9}
    given = {"link": 400.0, "latency": 5.0, "network": 0.0, "network_latency": 0.0}
    assert collective_seconds(one, given) == pytest.approx(2 * 70e9 / 400e9 + 10 * 3 * 5e-6)


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
        work = engine.measure_work(name, arguments, engine.call_tensors(name, arguments, {}, [out]))
        moved = 4 * (sum(x * y for x, y in shapes) + 10 * 4 * accumulate)
        assert work == (moved, 2 * 6 * 4 * 10, "grouped" if is_grouped else "products")


def test_work_of_engine_attention() -> None:
    """Attention has two products forward and five backward; causal attention needs half of each."""
    query, key = torch.empty(8, 2, 4, 16), torch.empty(8, 2, 2, 16)
    for name, products in (("fused_attn_fwd", 2), ("fused_attn_bwd", 5)):
        moved, flops, rate = engine.measure_work(name, [8, 8, query, key, key], [query, key])
        assert (moved, rate) == (query.nbytes + key.nbytes, "attention")
        assert flops == products * 2 * (2 * 4 * 8 * 8 * 16) / 2


def test_the_gpu_waits_for_the_host() -> None:
    host = host_seconds(1_000_000, 1_000_000, {"frame": 2.0, "launch": 3.0})
    assert host == pytest.approx(5.0)
    assert waiting_seconds(host, 2.0) == 3.0 and 0 < waiting_seconds(host, 10.0) < 1.0


def test_small_experts_and_heads_are_slower() -> None:
    """The products of the published layers in step_time.py take 8.7 of 10.2 ms and 9.7 of 11.4 ms."""
    for ffn, pairs, seconds in ((768, 32768 * 8, 8.7e-3), (512, 32768 * 10, 9.7e-3)):
        args = Namespace(moe_ffn_hidden_size=ffn, expert_tensor_parallel_size=1, kv_channels=64)
        roofline = engine.Roofline(args, rates("h100"), engine.Calls())
        roofline.add(0, 6.0 * pairs * 2048 * ffn, "grouped", grouped_share(args))
        assert roofline.parts["grouped"]["seconds"] == pytest.approx(seconds, rel=0.05)
    roofline.add(0, 227.5e12, "attention")
    assert roofline.parts["attention"]["seconds"] == pytest.approx(1.0, rel=0.01)


def test_hours_from_and_to() -> None:
    """At best, nothing waits and collectives are hidden; at most, the parts add up."""
    time = StepTime(products=0.2, traffic=0.1, waiting=0.1, links=0.1, network=0.6, bubble=1.5)
    assert (time.least, time.most) == pytest.approx((0.45, 0.6 + 0.7)) and "between nodes (46%)" in time.limit()
    text = "\n".join(conclude(time, 3600, 70.0, 80.0))
    assert "Fits: 70.0 of 80 GiB" in text and "27.0 minutes, 1.3 hours" in text and "450 to 1,300 ms" in text
    for needed in (90.0, None):
        assert "DOES NOT FIT" in [*conclude(time, 0, needed, 80.0)][-1]
