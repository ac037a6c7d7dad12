"""Flags, and hooks into Megatron's own training loop; docs/design.md shows how a script of one's own uses them."""

from megatron.remoe.training.arguments import (
    add_remoe_arguments,
    model_config_from_args,
    parse_and_validate_args,
    transformer_config_from_args,
)
from megatron.remoe.training.hooks import (
    install_local_layers,
    install_routing,
    with_flips,
)
from megatron.remoe.training.run_log import keep_run_log

__all__ = [
    "add_remoe_arguments",
    "install_local_layers",
    "install_routing",
    "keep_run_log",
    "model_config_from_args",
    "parse_and_validate_args",
    "transformer_config_from_args",
    "with_flips",
]
