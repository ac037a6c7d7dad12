"""Hooks into Megatron's own training loop.

Three lines make a ReMoE script of one that trains with `megatron.training`:

    args = parse_and_validate_args(...)                                         # instead of Megatron's
    model_cfg = gpt_config_from_args(args, config=transformer_config_from_args(args))
    install_relu_routing(args, model_cfg)
"""

from megatron.remoe.training.arguments import (
    add_remoe_arguments,
    parse_and_validate_args,
    transformer_config_from_args,
    usage_errors,
)
from megatron.remoe.training.hooks import install_local_layers, install_relu_routing

__all__ = [
    "add_remoe_arguments",
    "install_relu_routing",
    "install_local_layers",
    "parse_and_validate_args",
    "transformer_config_from_args",
    "usage_errors",
]
