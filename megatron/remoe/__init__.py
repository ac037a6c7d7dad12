"""ReLU routing for Mixture-of-Experts models on Megatron (ReMoE, arXiv 2412.14711).

Read the method in routing/router.py and routing/controller.py, and the MoE layer in layer/layer.py. This module exports
the functions and classes for your own training script. Each is imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "ReMoEConfig": "routing.config",
    "ReLURouter": "routing.router",
    "SparsityController": "routing.controller",
    "ReMoELayer": "layer.layer",
    "with_router": "layer.specs",
    "with_fused_layers": "layer.specs",
    "add_remoe_arguments": "training.arguments",
    "model_config_from_args": "training.arguments",
    "transformer_config_from_args": "training.arguments",
    "install_local_layers": "training.local_layers",
    "install_routing": "training.routing_hooks",
    "dataset_config": "training.gpt",
    "get_batch": "training.gpt",
    "loss_func": "training.gpt",
    "write_run_log": "training.run_log",
    "add_summary": "training.summary",
    "check_folders_are_shared": "start.run_lock",
    "usage_errors": "start.messages",
    "apply_patches": "patches",
    "checked_arguments": "pretrain",
    "exit_on_error": "pretrain",
    "prepare": "pretrain",
}
__all__ = sorted(_MODULES)


def megatron_version() -> str:
    """Return the version of the megatron-core that is imported. It can be that of a clone."""
    version = str(importlib.import_module("megatron.core").__version__)
    return version.partition("+")[0]  # after the +, Megatron names the commit of a repository around its folder


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
