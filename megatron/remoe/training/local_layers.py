"""Install layers with PyTorch's fused kernels for `--transformer-impl local`."""

import argparse

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.remoe.files.errors import UsageError
from megatron.remoe.kernels.backend import wants_kernels
from megatron.remoe.layer.experts import supports_grouped_experts
from megatron.remoe.layer.specs import (
    REMOE_LAYER,
    SEQUENCE_PARALLEL_NORMS,
    LayerSpec,
    replace_classes,
    with_fused_layers,
)
from megatron.remoe.training.layer_changes import ModelConfig, change_layers
from megatron.training.models.hybrid import HybridModelConfig


def install_local_layers(args: argparse.Namespace, model_cfg: ModelConfig) -> None:
    """Install layers with PyTorch's fused kernels for --transformer-impl local, for any routing.

    With --no-local-layer-fusion only the norms change, and only for sequence parallelism. With Transformer Engine only
    the MoE layers change, and only with --moe-kernels.

    Args:
        args: arguments from `checked_arguments`. The data loader's causal attention mask is turned off if the
            fused kernels do not need it.
        model_cfg: its layer specification may be the caller's own.

    Raises:
        UsageError: a setting does not work with these layers.
    """
    if args.transformer_impl != "local":
        if wants_kernels(args):
            change_layers(model_cfg, lambda spec, _vp_stage: replace_classes(spec, REMOE_LAYER))
        return
    if args.multi_latent_attention:
        raise UsageError("--multi-latent-attention: needs --transformer-impl transformer_engine.", "REMOE-E209")
    stacks_experts = args.num_experts and args.local_layer_fusion and supports_grouped_experts(model_cfg.transformer)
    # core/optimizer/emerging_optimizers.py: _is_nonlinear_or_embedding.
    if stacks_experts and args.optimizer not in ("adam", "sgd"):
        raise UsageError(
            f"--optimizer {args.optimizer} would train the experts of --transformer-impl local with Adam: it takes "
            "two-dimensional weights, and theirs are stacked. Add --no-local-layer-fusion, or use --optimizer adam.",
            "REMOE-E209",
        )
    is_hybrid = isinstance(model_cfg, HybridModelConfig)
    if args.local_layer_fusion and not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False

    def change(spec: LayerSpec, vp_stage: int | None) -> LayerSpec:
        if args.local_layer_fusion:
            spec = with_fused_layers(spec)
        if not args.sequence_parallel:
            return spec
        if isinstance(spec, ModuleSpec) and not is_hybrid:
            # With the specification of a single layer, Megatron would choose the final norm itself.
            num_layers = get_num_layers_to_build(model_cfg.transformer, vp_stage=vp_stage)
            spec = TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=WrappedTorchNorm)
        return replace_classes(spec, SEQUENCE_PARALLEL_NORMS)

    change_layers(model_cfg, change)
