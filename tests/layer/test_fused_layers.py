"""Test fused attention and grouped experts against Megatron's: values, gradients and training runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.remoe.layer.experts import GroupedExperts
from megatron.remoe.transformer.attention import FusedDotProductAttention
from megatron.remoe.transformer.norm import build_sequence_parallel_norm
from tests.kernels import DEVICE
from tests.layers import HIDDEN, make_config, make_layer
from tests.tiny_model import TOPK
from tests.training_runs import TINY, run, series

needs_groups = pytest.mark.usefixtures("process_groups")


def attention(kind: type[DotProductAttention], **changes: Any) -> DotProductAttention:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    config = make_config(**sizes, attention_dropout=0.0, bf16=False, **changes)
    return kind(config, layer_number=2, attn_mask_type=AttnMaskType.causal, attention_type="self")


@needs_groups
@pytest.mark.parametrize("mask", ["none", "causal", "documents", "cache"])
@pytest.mark.parametrize("changes", [{}, {"window_size": (3, 0)}, {"softmax_type": "off-by-one"}], ids=str)
def test_attention_is_megatrons(mask: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    options = {"dtype": torch.float64, "device": DEVICE, "requires_grad": True}
    query, key, value = (torch.randn(9, 2, heads, 8, **options) for heads in (4, 2, 2))
    hidden = None
    if mask == "cache":  # one query, nine keys, no mask
        query = query[-1:]
    if mask in ("causal", "documents"):
        hidden = torch.ones(9, 9, dtype=torch.bool, device=DEVICE).triu(1)[None, None].expand(2, 1, 9, 9).clone()
    if mask == "documents":  # a new document begins in the middle
        hidden[:, :, 5:, :5] = True
    results = []
    for kind in (DotProductAttention, FusedDotProductAttention):
        output = attention(kind, **changes)(query, key, value, hidden)
        results.append((output, *torch.autograd.grad(output.cos().sum(), (query, key, value))))
    # Masked scores are -10000 in Megatron's attention and -inf in ours.
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@needs_groups
def test_fewer_queries_than_keys_need_a_mask() -> None:
    tensors = [torch.ones(size, 2, heads, 8, device=DEVICE) for size, heads in ((3, 4), (9, 2), (9, 2))]
    with pytest.raises(AssertionError):
        attention(FusedDotProductAttention)(*tensors, None)


@needs_groups
def test_attention_dropout_follows_megatrons_generator() -> None:
    attend = attention(FusedDotProductAttention)
    attend.attention_dropout.p = 0.5
    tensors = [torch.ones(16, 2, heads, 8, dtype=torch.float64, device=DEVICE) for heads in (4, 2, 2)]
    torch.manual_seed(1)
    first = attend(*tensors, None)
    torch.manual_seed(1)  # has no effect: dropout uses a different generator
    second = attend(*tensors, None)
    assert not torch.equal(first, second) and first.std() > 0
    assert attend.eval()(*tensors, None).std() < 1e-12


@needs_groups
@pytest.mark.parametrize("sizes", [[4, 0, 3], [0, 0, 0], [0, 7, 0]], ids=str)
def test_experts_are_megatrons(sizes: list[int]) -> None:
    torch.manual_seed(2)
    rows = torch.randn(sum(sizes), HIDDEN, dtype=torch.float64, device=DEVICE, requires_grad=True)
    gates = torch.rand(sum(sizes), dtype=torch.float64, device=DEVICE, requires_grad=True)
    modules = []
    for fused in (False, True):
        model_parallel_cuda_manual_seed(5)
        modules.append(make_layer(make_config(num_moe_experts=3), fused).experts)
    sequential, grouped = modules
    assert isinstance(sequential, SequentialMLP) and isinstance(grouped, GroupedExperts)
    results = []
    for module in modules:
        output, bias = module(rows, torch.tensor(sizes), gates)
        assert bias is None
        output.sin().sum().backward()
        results.append((output.detach(), rows.grad.clone(), gates.grad.clone()))
        rows.grad = gates.grad = None
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for index, expert in enumerate(sequential.local_experts):
        for name, mine in (("linear_fc1", grouped.fc1), ("linear_fc2", grouped.fc2)):
            weight = getattr(expert, name).weight
            assert torch.equal(weight, mine[index]), "the same initial weights"
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(mine.grad[index], expected, rtol=1e-12, atol=1e-12)


@needs_groups
def test_megatrons_hook_runs_once_for_all_chunks() -> None:
    """The gradient goes to Megatron's buffer. Autograd gets an empty one, so that the hook's stream still waits."""
    layer = make_layer(make_config(moe_relu_activation_limit=1.0), fused=True)
    weights = list(layer.experts.parameters())
    for weight in weights:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    ran: list[bool] = []
    accumulators = [weight.expand_as(weight).grad_fn.next_functions[0][0] for weight in weights]
    for accumulator in accumulators:
        accumulator.register_hook(lambda _, gradients: ran.append(gradients[0].is_sparse))
    calls: list[torch.Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments[2]))
    tokens = torch.randn(16, 2, HIDDEN, dtype=torch.float64, device=DEVICE)
    layer(tokens)[0].pow(2).sum().backward()
    assert len(calls) >= 4 and ran == [True, True], "at least two chunks, each twice"
    assert all(weight.grad_added_to_main_grad for weight in weights)


@needs_groups
@pytest.mark.parametrize(
    "changes", [{"add_bias_linear": True}, {"gated_linear_unit": False}, {"activation_func": torch.nn.functional.gelu}]
)
def test_other_experts_stay_megatrons(changes: dict[str, Any]) -> None:
    assert isinstance(make_layer(make_config(**changes), fused=True).experts, SequentialMLP)


def test_norms_refuse_weights_centered_at_zero() -> None:
    with pytest.raises(ValueError, match="--apply-layernorm-1p: "):
        build_sequence_parallel_norm(make_config(layernorm_zero_centered_gamma=True), HIDDEN)


def test_same_training(data: Path) -> None:
    """Top-k training has the same losses with fused layers as with Megatron's. test_resharding tests this for ReMoE."""
    words = [*TINY, *TOPK, "--moe-router-topk", "3", "--data-path", str(data), "--train-iters", "4"]
    losses = [series(run([*words, *flags]), "lm loss") for flags in ([], ["--no-local-layer-fusion"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4
