"""Test fused attention and grouped experts against Megatron's: values, gradients and initial weights."""

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
from tests.layers import HIDDEN, expert_weights, make_config, make_layer

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
def test_experts_have_megatrons_initial_weights() -> None:
    weights = []
    for fused in (False, True):
        model_parallel_cuda_manual_seed(5)
        layer = make_layer(make_config(num_moe_experts=3), fused)
        assert isinstance(layer.experts, GroupedExperts if fused else SequentialMLP)
        weights.append([weight for pair in expert_weights(layer) for weight in pair])
    assert all(torch.equal(theirs, mine) for theirs, mine in zip(*weights, strict=True))


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
