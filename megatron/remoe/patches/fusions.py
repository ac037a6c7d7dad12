"""Provide Megatron's fusions without Transformer Engine, apex or a compiler. Megatron's own flags turn them on."""

from importlib.util import find_spec
from types import SimpleNamespace

from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import layers
from megatron.remoe.kernels.main_grad import add_outer
from megatron.remoe.patches.patch import patch
from megatron.remoe.transformer.cross_entropy import vocab_parallel_cross_entropy


@patch(
    changes={
        "core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward": "0a5b564d",
    },
    provides="--gradient-accumulation-fusion on GPUs without apex",
    ends="linear layers accumulate weight gradients without apex's module",
)
def enable_torch_weight_gradient_fusion() -> None:
    """Support --gradient-accumulation-fusion without apex.

    apex calls a cuBLAS product that torch offers too: it adds the product of half-precision factors to an fp32 tensor.
    """
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=add_outer, wgrad_gemm_accum_fp16=add_outer
        )
        layers._grad_accum_fusion_available = True


@patch(
    changes={
        "core.models.common.language_module.language_module:LanguageModule.compute_language_model_loss": "cfdd8209",
    },
    provides="a cross entropy that reads the logits once in each direction, without Transformer Engine",
    ends="the native fusion reads bf16 logits once forward and once backward",
)
def use_fla_cross_entropy() -> None:
    """Use flash-linear-attention's kernels for --cross-entropy-loss-fusion if the package is installed.

    Megatron's own version is written for torch.compile. It stores an fp32 softmax, and returns bf16 gradients even for
    fp32 models.
    """
    if find_spec("fla") is not None:
        language_module.fused_vocab_parallel_cross_entropy = vocab_parallel_cross_entropy
