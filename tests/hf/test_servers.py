"""Test the interface that vLLM needs from the model for transformers; test_vllm.py runs vLLM's server."""

import inspect
import subprocess
import sys
import tomllib

import torch

from tests.hf.test_modeling import make, tokens
from tools.console.places import ROOT


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
    lines = f"import sys, {module} as plugin\nplugin.{function}()\nimport transformers\ntransformers.RemoeForCausalLM\n"
    lines += "transformers.AutoConfig.for_model('remoe')\n"
    lines += "print([name for name in sys.modules if name.startswith(('megatron.core', 'megatron.training'))])"
    assert subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True).stdout == "[]\n"
