"""Test that a layer with QuACK's products equals one with PyTorch's, with room for more pairs than there are."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron.remoe.layer import grouped_swiglu
from megatron.remoe.layer import layer as moe_layer
from tests import quack_stand_in
from tests.layer.test_launch_ahead import SETTINGS, numbers, tokens_of
from tests.layers import make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in chunks": {"moe_relu_activation_limit": 1.0},
    "launched ahead": {"moe_relu_launch_ahead": True},
    "in a graph": {
        "cuda_graph_impl": "full_iteration", "moe_relu_max_experts": 3, "moe_relu_activation_limit": 0.0,
    },
    "sent": {
        "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True, "moe_relu_activation_limit": 0.0,
    },
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU's kernels")
@pytest.mark.parametrize("way", WAYS)
def test_numbers_of_a_layer(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quack_stand_in.put_in(monkeypatch)
    monkeypatch.setattr(grouped_swiglu, "takes_grouped_kernel", lambda _fc1: True)
    monkeypatch.setattr(moe_layer, "takes_grouped_kernel", lambda _fc1: True)
    settings = SETTINGS | WAYS[way]
    layers = [make_layer(make_config(**(settings | {"moe_kernels": kernels})), True) for kernels in ("triton", "quack")]
    layers[1].load_state_dict(layers[0].state_dict())
    plain, fused = layers
    assert fused._pair_multiple == (1 if way == "sent" else fused.backend.pair_multiple) and plain._pair_multiple == 1
    for weight in (weight for layer in layers for weight in (layer.experts.fc1, layer.experts.fc2)):
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    for seed in (1, 2):
        tokens = tokens_of(plain, seed)
        expected = numbers(plain, tokens)
        with monkeypatch.context() as others:
            others.setattr(grouped_swiglu.OneKernel, "multiply", None)
            found = numbers(fused, tokens)
        assert all((ours - theirs).norm() <= 1e-5 * theirs.norm() for ours, theirs in zip(found, expected, strict=True))
