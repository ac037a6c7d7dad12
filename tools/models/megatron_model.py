"""Build Megatron's model in one process from the arguments of a training run, without a launcher.

Call `on_cpu.megatron_on_cpu` before importing this on a CPU.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.remoe import cpu
from megatron.remoe.training.build import build_model

from ..console.errors import ConversionError

ONE = """world_size tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
expert_model_parallel_size expert_tensor_parallel_size""".split()
UNSET = """virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage pipeline_model_parallel_layout
decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers moe_warmup_topk recompute_granularity
recompute_modules moe_input_jitter_eps fp8 fp4 inference_cuda_graph_scope flash_attention_version""".split()
OFF = """account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split sequence_parallel
moe_shared_expert_overlap overlap_moe_expert_parallel_comm local_layer_fusion fp16 bf16 moe_permute_fusion
moe_router_fusion moe_router_padding_for_quantization delay_wgrad_compute use_torch_fsdp2 init_model_with_meta_device
use_te_activation_func fused_single_qkv_rope fp8_param_gather fp4_param_gather fp8_output_proj moe_enable_deepep
defer_embedding_wgrad_compute""".split()
# One process on the CPU, in single precision, after the run's warm-up and without its noise.
SINGLE_PROCESS_SETTINGS: dict[str, Any] = {
    **{"rank": 0, "moe_warmup_steps": 0, "cuda_graph_impl": "none", "params_dtype": torch.float32},
    **{"moe_kernels": "torch", "moe_token_dispatcher_type": "alltoall", "moe_flex_dispatcher_backend": "deepep"},
    "attention_backend": AttnBackend.auto,  # Megatron refuses models with different ones in a process
    **(dict.fromkeys(ONE, 1) | dict.fromkeys(UNSET) | dict.fromkeys(OFF, False)),
}
EXPERT = re.compile(r"(?P<mlp>.*\.mlp\.)experts\.local_experts\.(?P<expert>\d+)\.(?P<weight>linear_fc[12]\.\w+)")


def build(args: argparse.Namespace) -> GPTModel:
    """Build a model in this process, in single precision, for evaluation.

    Raises:
        ConversionError: Megatron rejects the arguments.
    """
    here = argparse.Namespace(**(vars(args) | SINGLE_PROCESS_SETTINGS))
    if getattr(here, "hybrid_layer_pattern", None):
        here.hybrid_layer_pattern = here.hybrid_layer_pattern.replace("|", "")
    cpu.adapt_arguments(here, trains=False)
    try:
        return build_model(here).eval()
    except (ValueError, AssertionError, TypeError) as error:
        raise ConversionError(f"Megatron cannot build this model here: {error}", "REMOE-E512") from error


@contextmanager
def one_process(seed: int = 1234, backend: str = "gloo") -> Iterator[None]:
    """Set up Megatron's process groups for one process, and its random generators, unless groups exist already."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
