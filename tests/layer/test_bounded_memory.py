"""Test the activation limit: a layer with more pairs runs in chunks and gives the same result."""

from types import SimpleNamespace

import pytest
import torch

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers
from megatron.remoe import patches
from megatron.remoe.kernels.pytorch import PYTORCH
from megatron.remoe.layer import counting
from tests.layers import HIDDEN, make_config, make_layer

pytestmark = pytest.mark.usefixtures("process_groups")


def dispatched_pairs(layer) -> list[int]:
    """Return a list that collects the number of pairs in each later call of the experts."""
    pairs: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _module, arguments: pairs.append(len(arguments[2])))
    return pairs


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "MoE recompute"])
@pytest.mark.parametrize("limit", [1.0, 1.4, 1.6])
def test_bounded_activations_change_nothing(limit: float, recompute: bool, dispatcher: str) -> None:
    results, weights = [], None
    for bound in (0.0, limit):
        torch.manual_seed(4)
        settings = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
        settings |= {"num_moe_experts": 8, "moe_router_topk": 2, "moe_token_dispatcher_type": dispatcher}
        settings |= {"moe_relu_activation_limit": bound, "moe_shared_expert_intermediate_size": 8}
        layer = make_layer(make_config(**settings, moe_relu_l1_reg_coeff_init=0.2), fused=True)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        dispatched = dispatched_pairs(layer)
        tokens = torch.randn(23, 3, HIDDEN, dtype=torch.float64, device=layer.router.weight.device, requires_grad=True)
        output = layer(tokens)[0]
        output.pow(2).sum().backward()
        counts = layer.router.counts
        gradients = [parameter.grad for parameter in (tokens, *layer.parameters())]
        results.append((output.detach(), counts["tokens_per_expert"], *gradients))
        pairs = int(counts.active)
        assert pairs > limit * 2 * 69, "more than the limit, or this tests nothing"
        if bound:
            assert max(dispatched) <= bound * 2 * 69
            assert len(dispatched) >= 2 * pairs / (bound * 2 * 69), "each chunk twice"
            assert counts["extra_chunks"] == len(dispatched) // (3 if recompute else 2) - 1
        else:
            assert set(dispatched) == {pairs} and counts["extra_chunks"] == 0
    for plain, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "grouped"])
def test_gradients_are_reduced_after_the_last_chunk(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks do not change the gradients in Megatron's buffer, whose reduction overlaps with the backward pass."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    patches.fusions.enable_torch_weight_gradient_fusion()
    results, weights = [], None
    for limit in (0.0, 1.0):
        torch.manual_seed(4)
        in_fp32 = {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "moe_router_dtype": "fp32"}
        config = make_config(moe_relu_activation_limit=limit, gradient_accumulation_fusion=True, **in_fp32)
        layer = make_layer(config, fused=fused)
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        dispatched = dispatched_pairs(layer)
        overlap = DistributedDataParallelConfig(overlap_grad_reduce=True)
        model = DistributedDataParallel(config, overlap, layer)
        for _ in range(2):  # in the first step Megatron reduces only at the end
            model.zero_grad_buffer()
            tokens = torch.randn(9, 2, HIDDEN, device=layer.router.weight.device, requires_grad=True)
            model(tokens)[0].square().sum().backward()
            model.finish_grad_sync()
        assert len(dispatched) > 4 or not limit
        results.append([parameter.main_grad.clone() for parameter in layer.parameters()])
    for plain, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_unevenly_active_tokens_are_bounded_too() -> None:
    """If active tokens are next to each other, even the chunk with the most pairs keeps to the limit."""
    config = make_config(num_moe_experts=8, moe_relu_activation_limit=2.0)
    layer = make_layer(config, fused=True)
    layer.router.weight.data.abs_()
    tokens = -torch.ones(32, 1, HIDDEN, dtype=torch.float64, device=layer.router.weight.device)
    tokens[3:12] = 1.0
    dispatched = dispatched_pairs(layer)
    layer(tokens)
    assert sum(dispatched) == 9 * 8 and max(dispatched) <= 2 * 32


def test_received_pairs_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two ranks sends no more pairs than the limit allows, but one of them receives all."""
    gathered = "gather_from_sequence_parallel_region"
    monkeypatch.setattr(counting, gathered, lambda pairs, group: pairs.repeat(group.size(), 1))
    group = SimpleNamespace(size=lambda: 2)
    dispatcher = SimpleNamespace(ep_size=2, tp_size=1, ep_rank=0, tp_rank=0, tp_ep_group=group)
    map_TE = torch.tensor([[True, False, False, False]] * 8)
    assert len(counting.count_pairs(map_TE, None, dispatcher, PYTORCH, 1.0)) == 2
    dispatcher.ep_size, dispatcher.tp_size = 1, 2  # both ranks have a half of each expert: a pair takes half as much
    assert len(counting.count_pairs(map_TE, None, dispatcher, PYTORCH, 1.0)) == 1


def test_at_the_target_nothing_is_computed_twice() -> None:
    config = make_config(num_moe_experts=4, moe_router_topk=2, moe_relu_activation_limit=1.0)
    layer = make_layer(config, fused=True)
    weight = layer.router.weight.data.abs_()
    weight[2:].neg_()
    dispatched = dispatched_pairs(layer)
    tokens = torch.rand(6, 2, HIDDEN, dtype=torch.float64, device=layer.router.weight.device) + 0.1
    layer(tokens.requires_grad_())[0].sum().backward()
    assert dispatched == [24]


def test_evaluation_is_bounded() -> None:
    layer = make_layer(make_config(moe_relu_activation_limit=1.0), fused=True).eval()
    layer.router.weight.data.abs_()
    dispatched = dispatched_pairs(layer)
    with torch.no_grad():
        layer(torch.ones(8, 1, HIDDEN, dtype=torch.float64, device=layer.router.weight.device))
        layer(torch.ones(1, 1, HIDDEN, dtype=torch.float64, device=layer.router.weight.device))  # cannot be cut
    assert dispatched == [*[8] * 4, 4]
