"""Build a model with the routing and the layers of the flags, outside of Megatron's loop."""

import argparse
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.remoe.training.arguments import model_config_from_args
from megatron.remoe.training.local_layers import install_local_layers
from megatron.remoe.training.routing_hooks import install_routing
from megatron.training.models.base import compose_hooks


def build_model(args: argparse.Namespace) -> Any:
    """Build the model that the flags describe, in one part and without Megatron's wrappers.

    Args:
        args: Megatron's arguments, for one pipeline stage without virtual ones.

    Raises:
        TypeError, UsageError: see `install_routing` and `install_local_layers`.
    """
    model_cfg = model_config_from_args(args)
    install_routing(args, model_cfg)
    install_local_layers(args, model_cfg)
    stock = model_cfg.get_builder_cls()(model_cfg).build_model(ProcessGroupCollection.use_mpu_process_groups())
    (model,) = compose_hooks(model_cfg.pre_wrap_hooks)([stock])
    return model
