"""Support PyTorch's norms under sequence parallelism, which Megatron's wrapper refuses."""

import torch

from megatron.core.transformer.transformer_config import TransformerConfig

NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def build_sequence_parallel_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """Build `torch.nn.RMSNorm` or `LayerNorm` whose weight gradients are summed over the tensor parallel group.

    Each rank normalizes its part of the sequence with the same weights; Megatron sums the gradients of parameters
    that have `sequence_parallel` set. In a layer specification it replaces the class `WrappedTorchNorm`.

    Raises:
        ValueError: `config.layernorm_zero_centered_gamma` is set.
    """
    if config.layernorm_zero_centered_gamma:
        raise ValueError("--apply-layernorm-1p: PyTorch's norms do not support it. Leave it out.")
    norm = NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
