"""Open a run's checkpoint as a model for transformers."""

import argparse
from pathlib import Path

from megatron.remoe.hf import RemoeConfig

from ..checkpoints import Checkpoint, find
from ..hybrid import as_gpt
from .settings import complete, config_of
from .weights import exponents


def open_run(root: Path, step: int | None) -> tuple[Checkpoint, argparse.Namespace, RemoeConfig]:
    """Return a run's newest checkpoint, or the one of an iteration, its arguments, and the model's configuration.

    Layers of multi-token prediction are left out: the model's logits do not need them.

    Raises:
        ConversionError: there is no checkpoint, it cannot be read, or its model cannot be expressed.
    """
    checkpoint = find(root, step)
    args = complete(checkpoint.args)
    args.mtp_num_layers = None
    if args.hybrid_layer_pattern:
        args.hybrid_layer_pattern = args.hybrid_layer_pattern.split("/")[0]
    args = as_gpt(args, checkpoint.folder)
    config = config_of(args)
    if args.num_experts and args.moe_relu_routing:
        config.router_aux_loss_coef *= args.moe_relu_l1_reg_coeff_multiplier ** max(exponents(checkpoint), default=0)
    return checkpoint, args, config
