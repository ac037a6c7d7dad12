"""Test the structure that inference servers expect of the model for transformers."""

import inspect
import subprocess
import sys
import tomllib

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hf.test_modeling import make, tokens
from tools.console.places import ROOT


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


def test_plugin_for_vllm_does_not_import_megatron() -> None:
    """The function of the entry point registers the model with vLLM and transformers."""
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = group["remoe"].partition(":")
    lines = f"import sys, transformers, {module} as plugin\nplugin.{function}()\ntransformers.RemoeForCausalLM\n"
    lines += "transformers.AutoConfig.for_model('remoe')\n"
    lines += "print([name for name in sys.modules if name.startswith(('megatron.core', 'megatron.training'))])"
    assert subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True).stdout == "[]\n"
