"""Test the structure that inference servers expect of the model for transformers."""

import inspect
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hf.test_modeling import make, tokens


def test_structure_that_servers_ask_for() -> None:
    """With a server's attention and experts, logits stay the same, and experts get tensors of fixed shapes."""
    model, ids = make("relu, shared", max_experts_per_token=3), tokens()
    with torch.no_grad():
        logits = model(ids).logits
    config, seen = model.config, []
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 2, 24)

    def attention(module, query, key, value, mask, scaling, **kwargs):
        seen.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)

    class Server(torch.nn.Module):
        def __init__(self, experts: torch.nn.Module) -> None:
            super().__init__()
            assert experts.gate_up_proj.dim() == experts.down_proj.dim() == 3
            self.held = experts

        def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            assert index.shape == weights.shape == (len(hidden), 3)
            return self.held(hidden, index, weights)

    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = Server(layer.mlp.experts)
    AttentionInterface.register("a_servers", attention)
    model.set_attn_implementation("a_servers")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert seen == [0, 1]


def test_arguments_that_vllm_passes() -> None:
    """vLLM requires these names in the decoder's signature. The positions take effect."""
    model, ids = make("relu").model.get_decoder(), tokens()
    assert {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(type(model).forward).parameters)
    given = {"input_ids": ids, "inputs_embeds": None, "use_cache": False, "attention_instances": {}}
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden, stretched = (model(**given, position_ids=n * positions, return_dict=False)[0] for n in (1, 2))
        assert torch.equal(hidden, model(ids).last_hidden_state) and not torch.allclose(stretched, hidden)


def test_block_that_vllm_replaces() -> None:
    """The block's `forward` is replaced by one with a single argument; the gate routes (`_hf_topk_router`)."""
    model, ids = make("relu, shared", max_experts_per_token=3), tokens()
    block = model.model.layers[1].mlp

    def fused(hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, 1)
        _, weights, experts = block.gate(rows)
        return (block.experts(rows, experts, weights) + block.shared_expert(rows)).view_as(hidden_states)

    with torch.no_grad():
        logits = model(ids).logits
        block.forward = fused
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize(
    ("name", "changes", "routing"),
    [
        ("relu", {"max_experts_per_token": 3}, "none"),
        ("relu, shared", {"max_experts_per_token": 3}, None),
        ("top-k, normed", {}, ("softmax", True)),
        ("top-k, scaled", {}, ("softmax", False)),
        ("sigmoid, bias", {}, ("sigmoid", True)),
    ],
)
def test_vllms_matcher(name: str, changes: dict[str, Any], routing: Any) -> None:
    """If vLLM 0.33 is installed, it finds the gate, the experts and the shared expert.

    Without a softmax or sigmoid it needs a shared expert; ReLU routing without one it leaves to the block.
    """
    moe = pytest.importorskip("vllm.model_executor.models.transformers.fusers.moe")
    found = moe.MoEBlockFuser.match(make(name, **changes).model.layers[1].mlp, "experts")
    if routing == "none":
        assert found is None
    else:
        assert (found.gate_name, found.shared_name) == ("gate", "shared_expert" if "shared" in name else None)
        assert (found.scoring_func, found.renormalize) == (routing or (None, None))
