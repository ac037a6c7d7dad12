"""Count the parameters of each pipeline stage: build Megatron's model with fake tensors in a fake process group."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.remoe.training.arguments import model_config_from_args
from megatron.remoe.training.local_layers import install_local_layers
from megatron.remoe.training.routing_hooks import install_routing

LAYOUT = "tensor_model pipeline_model virtual_pipeline_model context expert_model expert_tensor".split()
UNEVEN = "pipeline_model_parallel_layout decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers".split()
# Unset while the model is built: some values need Transformer Engine, and no value changes the parameters.
BUILT_WITHOUT = """recompute_granularity fp8 fp8_param_gather fp8_output_proj moe_router_padding_for_fp8
moe_router_padding_for_quantization""".split()


@dataclass(frozen=True)
class Stage:
    """The parameters on one GPU of a pipeline stage.

    Attributes:
        shared: parameters outside the routed experts, after tensor parallelism.
        experts: parameters of the routed experts, after expert and expert tensor parallelism.
        layers: sublayers of each transformer layer, in the letters of --hybrid-layer-pattern: two in GPTModel, one in
            HybridModel. The layers of multi-token prediction come last.
    """

    shared: int
    experts: int
    layers: tuple[str, ...]


def count_stages(args: argparse.Namespace) -> list[Stage]:
    """Count the parameters and layers of each pipeline stage on its first GPU.

    Args:
        args: Megatron's validated arguments; `world_size` need not be the number of real processes.

    Raises:
        ValueError, AssertionError, RuntimeError: Megatron cannot build this model in this layout.
    """
    args = argparse.Namespace(**vars(args))
    args.perform_initialization = False
    vars(args).update(dict.fromkeys(BUILT_WITHOUT))
    if not args.cpu:
        args.context_parallel_size = 1  # more would need Transformer Engine, and does not change the parameters
    gpus_per_stage = args.world_size // args.pipeline_model_parallel_size
    return [_stage(args, stage * gpus_per_stage) for stage in range(args.pipeline_model_parallel_size)]


def count_whole_model(args: argparse.Namespace) -> tuple[int, int]:
    """Return the number of parameters of the whole model, and of all its routed experts."""
    one_gpu: dict[str, Any] = dict.fromkeys([f"{kind}_parallel_size" for kind in LAYOUT], 1)
    one_gpu |= {"world_size": 1, "sequence_parallel": False, "virtual_pipeline_model_parallel_size": None}
    one_gpu |= dict.fromkeys(UNEVEN)
    pattern = args.hybrid_layer_pattern and args.hybrid_layer_pattern.replace("|", "")
    (stage,) = count_stages(argparse.Namespace(**vars(args) | one_gpu | {"hybrid_layer_pattern": pattern}))
    return stage.shared + stage.experts, stage.experts


def _stage(args: argparse.Namespace, rank: int) -> Stage:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    try:
        sizes = {f"{kind}_parallel_size": getattr(args, f"{kind}_parallel_size") for kind in LAYOUT}
        parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
        model_cfg = model_config_from_args(args)
        install_routing(args, model_cfg)
        install_local_layers(args, model_cfg)
        builder = model_cfg.get_builder_cls()(model_cfg)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        chunks = args.virtual_pipeline_model_parallel_size or 1
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
        return count(models)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def count(models: list[torch.nn.Module]) -> Stage:
    """Count the parameters and layers of a stage from its model chunks."""
    shared, experts, layers = 0, 0, list[str]()
    for model in models:
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                experts += parameter.numel()
            else:
                shared += parameter.numel()
        layers += _sublayers(model)
    return Stage(shared, experts, tuple(layers))


def _sublayers(model: torch.nn.Module) -> list[str]:
    sublayers = []
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            letters = "" if isinstance(layer.self_attention, IdentityOp) else "*"
            if not isinstance(layer.mlp, IdentityOp):
                letters += "E" if isinstance(layer.mlp, MoELayer) else "-"
            sublayers.append(letters)
    return sublayers
