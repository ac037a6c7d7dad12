"""Specify plain PyTorch layers for HybridModel; Megatron has them only for GPTModel."""

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    get_mtp_layer_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

LOCAL_LAYERS = {Symbols.ATTENTION, Symbols.MLP, Symbols.MOE}


class LocalHybridStack(HybridStack):
    """`HybridStack` whose final norm is not Transformer Engine's.

    Args:
        layer_norm: builds the final norm.
        post_layer_norm: whether the last stage has one.
    """

    def __init__(
        self, *arguments: Any, layer_norm: LayerNormBuilder, post_layer_norm: bool = True, **options: Any
    ) -> None:
        super().__init__(*arguments, post_layer_norm=False, **options)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            config = self.config
            self.final_norm = layer_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def local_hybrid_stack_spec(config: TransformerConfig, pattern: str) -> ModuleSpec:
    """Return the specification of a stack from the parts of Megatron's local GPT layers, one sublayer per layer.

    Parameters have the same names in checkpoints as in the local layers of GPTModel.

    Args:
        config: the model's configuration.
        pattern: the value of --hybrid-layer-pattern.

    Raises:
        ValueError: the pattern has layers that exist only in Transformer Engine's stack.
    """
    others = sorted(set(pattern) & Symbols.VALID_LAYERS - LOCAL_LAYERS)
    if others:
        raise ValueError(
            f"--hybrid-layer-pattern {pattern}: there are no plain PyTorch layers for {', '.join(others)}, but for "
            "* (attention), - (dense MLP) and E (MoE). Use --transformer-impl transformer_engine."
        )
    dense, moe = (
        get_gpt_layer_local_submodules(
            num_experts=experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
        for experts in (None, config.num_moe_experts)
    )
    layer = partial(TransformerLayerSubmodules, sharded_state_dict_keys_map=dense.sharded_state_dict_keys_map)
    attention = layer(
        input_layernorm=dense.input_layernorm, self_attention=dense.self_attention, self_attn_bda=dense.self_attn_bda
    )
    mlp, experts = (
        layer(pre_mlp_layernorm=kind.pre_mlp_layernorm, mlp=kind.mlp, mlp_bda=kind.mlp_bda) for kind in (dense, moe)
    )
    # The specification names no layer (None): each depth builds a stack of the layers above from the pattern.
    prediction = MultiTokenPredictionBlockSubmodules([get_mtp_layer_spec(None, use_transformer_engine=False)])
    return ModuleSpec(
        module=LocalHybridStack,
        params={"layer_norm": dense.input_layernorm},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
            mtp_block_spec=ModuleSpec(module=MultiTokenPredictionBlock, submodules=prediction),
        ),
    )
