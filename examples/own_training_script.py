"""A training script with its own flags, data sets and loss. Megatron's loop trains the model that the flags describe.

torchrun --nproc-per-node 8 examples/own_training_script.py --moe-relu-routing --num-experts 8 <more flags of Megatron>
"""
# ruff: noqa: E402

import argparse
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from megatron import remoe

ON_CPU = remoe.prepare()  # before other imports of Megatron

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args


def my_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--my-own-flag", type=int)
    return parser


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    def on_this_rank() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0

    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, num_samples, on_this_rank, remoe.dataset_config())
    return [None if wanted == 0 else data_set for wanted, data_set in zip(num_samples, builder.build(), strict=True)]


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    # Change the losses or the mask here. This function also checks for NaN, Inf and spikes, as the flags ask for.
    return remoe.loss_func(loss_mask, losses)


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    batch = remoe.get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    tokens, labels, loss_mask, attention_mask, positions = batch
    output = model(tokens, positions, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


with remoe.exit_on_error(), ExitStack() as exit_stack:
    with remoe.usage_errors():  # one message instead of a traceback
        args = remoe.checked_arguments(ON_CPU, exit_stack, my_arguments)
        remoe.apply_patches(saves=bool(args.save))
        model_cfg = remoe.model_config_from_args(args)  # a GPTModel or, with --hybrid-layer-pattern, a HybridModel
        remoe.install_routing(args, model_cfg)  # the router, its update after each step, and its figures in the log
        remoe.install_local_layers(args, model_cfg)  # with --transformer-impl local: fused layers, for any routing
        remoe.add_summary(args, model_cfg)
        model_cfg.pre_wrap_hooks.append(partial(remoe.check_folders_are_shared, args))
        exit_stack.enter_context(remoe.write_run_log(args))
    config = pretrain_cfg_container_from_args(args, model_cfg)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
