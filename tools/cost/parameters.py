"""Counts the parameters of each pipeline stage: builds Megatron's model without memory, in a fake process group."""

import argparse
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.remoe.training.arguments import model_config_from_args
from megatron.remoe.training.hooks import install_local_layers, install_routing


@dataclass(frozen=True)
class Stage:
    """The parameters on one GPU of a pipeline stage.

    Attributes:
        shared: parameters outside of experts, after tensor parallelism.
        experts: parameters of experts, after expert and expert tensor parallelism.
        layers: numbers (from 1) of its transformer layers.
    """

    shared: int
    experts: int
    layers: tuple[int, ...]


def stages(args: argparse.Namespace) -> list[Stage]:
    """Build the model of the first GPU of every pipeline stage and count.

    Args:
        args: Megatron's validated arguments; `world_size` need not be the number of real processes.

    Raises:
        ValueError, AssertionError, RuntimeError: Megatron cannot build this model in this layout.
    """
    args = argparse.Namespace(**vars(args))
    args.perform_initialization = False
    args.recompute_granularity = None  # some kinds need Transformer Engine, and none changes the parameters
    gpus_per_stage = args.world_size // args.pipeline_model_parallel_size
    return [_stage(args, stage * gpus_per_stage) for stage in range(args.pipeline_model_parallel_size)]


def total(args: argparse.Namespace) -> tuple[int, int]:
    """Return the parameters of the whole model, and those of its routed experts."""
    whole = _without_parallelism(args)
    stage = stages(whole)[0]
    return stage.shared + stage.experts, stage.experts


def _without_parallelism(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments of the same model without any parallelism."""
    alone = argparse.Namespace(**vars(args))
    alone.world_size = alone.tensor_model_parallel_size = alone.pipeline_model_parallel_size = 1
    alone.context_parallel_size = alone.expert_model_parallel_size = alone.expert_tensor_parallel_size = 1
    alone.virtual_pipeline_model_parallel_size = None
    alone.hybrid_layer_pattern = args.hybrid_layer_pattern and args.hybrid_layer_pattern.replace("|", "")
    alone.sequence_parallel = False
    return alone


def _stage(args: argparse.Namespace, rank: int) -> Stage:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        return _count(args)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _count(args: argparse.Namespace) -> Stage:
    model_cfg = model_config_from_args(args)
    install_routing(args, model_cfg)
    install_local_layers(args, model_cfg)
    builder = model_cfg.get_builder_cls()(model_cfg)
    groups, chunks = ProcessGroupCollection.use_mpu_process_groups(), args.virtual_pipeline_model_parallel_size or 1
    with FakeTensorMode():
        models = [
            builder.build_model(
                groups,
                pre_process=chunk == 0 and is_pp_first_stage(groups.pp),
                post_process=chunk == chunks - 1 and is_pp_last_stage(groups.pp),
                vp_stage=chunk if chunks > 1 else None,
            )
            for chunk in range(chunks)
        ]
    shared = experts = 0
    for name, parameter in (item for model in models for item in model.named_parameters()):
        if ".mlp.experts." in name:
            experts += parameter.numel()
        else:
            shared += parameter.numel()
    layers = tuple(layer.layer_number for model in models for layer in model.decoder.layers)
    return Stage(shared, experts, layers)
