"""The trained model for transformers: importing this registers it with AutoConfig and AutoModelForCausalLM.

The other files here need only torch and transformers. `save_pretrained` writes them next to the weights, so that
`from_pretrained(folder, trust_remote_code=True)` works where this project is not installed.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron.remoe.hf.configuration_remoe import RemoeConfig
from megatron.remoe.hf.modeling_remoe import RemoeForCausalLM, RemoeModel

AutoConfig.register(RemoeConfig.model_type, RemoeConfig, exist_ok=True)
AutoModel.register(RemoeConfig, RemoeModel, exist_ok=True)
AutoModelForCausalLM.register(RemoeConfig, RemoeForCausalLM, exist_ok=True)


def register_with_vllm() -> None:
    """Make `RemoeForCausalLM` known to vLLM, which looks for it in transformers. Entry point: vllm.general_plugins."""
    import transformers  # not at the top: transformers replaces its module object while it is imported

    transformers.RemoeForCausalLM = RemoeForCausalLM  # type: ignore[attr-defined]


__all__ = ["RemoeConfig", "RemoeForCausalLM", "RemoeModel"]
