"""Test that the host waits for the device once per MoE layer, for the counts, and never in the update."""

from unittest.mock import Mock

import pytest
import torch

from megatron.remoe.layer import counting
from megatron.remoe.routing.controller import SparsityController
from tests.layers import HIDDEN, Watch, make_config, make_layer
from tools.plan.fake_ranks import FakePairCounts

WAITING = "_local_scalar_dense nonzero masked_select is_nonzero _unique2 equal item where.default".split()
pytestmark = pytest.mark.usefixtures("process_groups")


def watch_waits() -> Watch:
    """Return a mode that collects the operations that make the host wait for a shape or a value."""
    return Watch(lambda name, _: name if name in WAITING or name.split(".")[0] in WAITING else None)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("limit", [0.0, 2.0], ids=["unbounded", "bounded"])
def test_a_layer_waits_once(limit: float, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(moe_router_topk=2, moe_relu_activation_limit=limit, moe_kernels=kernels)
    layer = make_layer(config, fused=True)
    tokens = torch.randn(8, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device, requires_grad=True)
    reads = watch_reads(monkeypatch)
    with watch_waits() as waits:
        layer(tokens)[0].sum().backward()
    assert reads.call_count == 1 and waits.seen == []


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_counts_that_nobody_asks_for_are_not_gathered(dispatcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit that a layer could exceed, only alltoall reads the counts."""
    settings = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": dispatcher}
    unbounded = make_layer(make_config(**settings, moe_relu_activation_limit=0.0))
    unreachable = make_layer(make_config(**settings, moe_relu_activation_limit=2.0))
    tokens = torch.randn(8, 2, HIDDEN, dtype=torch.float64, device=unbounded.router.weight.device)
    reads = watch_reads(monkeypatch)
    unbounded(tokens)
    unreachable(tokens)
    assert reads.call_count == (0 if dispatcher == "allgather" else 2), "alltoall is told by them who sends what"


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Return a mock that counts the later calls of `read_pairs`, which waits."""
    reads = Mock(wraps=counting.read_pairs)
    monkeypatch.setattr(counting, "read_pairs", reads)
    return reads


def test_the_update_does_not_wait() -> None:
    config = make_config()
    layer = make_layer(config)
    layer(torch.randn(8, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device))[0].sum().backward()
    controller = SparsityController([layer], config)
    with watch_waits() as waits:
        controller.update()
    assert waits.seen == []


def test_waiting_is_noticed() -> None:
    with watch_waits() as waits:
        float(torch.ones(()))
        torch.ones(3).nonzero()
    assert waits.seen == ["_local_scalar_dense.default", "nonzero.default"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: PyTorch tells of waits on CUDA alone")
def test_cuda_reports_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_name().endswith("(rehearsal)"):  # the map is not computed: it can have any number of pairs
        monkeypatch.setattr(counting, "read_pairs", FakePairCounts(0.5).counted(counting.read_pairs))
    config = make_config(params_dtype=torch.bfloat16, moe_router_dtype="fp32", moe_ffn_hidden_size=16)
    layer = make_layer(config, fused=True)
    controller = SparsityController([layer], config)
    tokens = torch.randn(8, 2, HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(tokens)[0].sum().backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warned:
            layer(tokens)[0].sum().backward()
            controller.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(warned) == 1
