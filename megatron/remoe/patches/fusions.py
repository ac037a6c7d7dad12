"""Megatron's fusions without Transformer Engine, apex or a compiler, under Megatron's own flags."""

from importlib.util import find_spec
from types import SimpleNamespace

import torch

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import layers
from megatron.remoe.local.cross_entropy import vocab_parallel_cross_entropy
from megatron.remoe.local.main_grad import add_outer
from megatron.remoe.local.rotary import FusedRotaryEmbedding


def add_weight_gradients_by_torch() -> None:
    """Let Megatron's linear layers add their weight gradients to the fp32 ones where apex is not installed.

    It refuses --gradient-accumulation-fusion without apex's module, which calls a product of cuBLAS that torch has too.
    """
    if layers._grad_accum_fusion_available:
        return
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=_add_weight_gradient, wgrad_gemm_accum_fp16=_add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def _add_weight_gradient(rows: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    """`main_grad += gradient.T @ rows`: `[rows, in]`, `[rows, out]` → `[out, in]`, in the type of `main_grad`."""
    add_outer(main_grad, gradient, rows)


def fuse_cross_entropy_without_compiler() -> None:
    """Let --cross-entropy-loss-fusion take flash-linear-attention's kernels, where that package is installed.

    Megatron's own is for torch.compile, in pieces: they keep the softmax in fp32, and give any model bf16 gradients.
    """
    if find_spec("fla") is not None:
        language_module.fused_vocab_parallel_cross_entropy = vocab_parallel_cross_entropy


def fuse_rotary_embedding_without_engine() -> None:
    """Let Megatron's rope fusion take flash-linear-attention's kernel where Transformer Engine is not installed."""
    if rope_utils.fused_apply_rotary_pos_emb is None and find_spec("fla") is not None:
        rope_utils.fused_apply_rotary_pos_emb = FusedRotaryEmbedding()
