"""Transformer Engine's experts with `--moe-kernels` between their products."""

from typing import Any

import torch

from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.typed_torch import apply_module
from megatron.remoe.kernels.backend import choose_backend
from megatron.remoe.layer.experts import takes_grouped_experts
from megatron.remoe.layer.grouped_swiglu import SwiGLU


class EngineExperts(TEGroupedMLP):
    """Megatron's experts of Transformer Engine, the same layers and checkpoints.

    Megatron's SwiGLU is for torch.compile, to which each new number of pairs is another shape; ours takes any.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.backend = choose_backend(self.config)
        recomputed = self.config.recompute_granularity == "selective" and "moe_act" in self.config.recompute_modules
        rest = self.config.use_transformer_engine_op_fuser or self.config.moe_mlp_glu_interleave_size is not None
        offloaded = self.config.fine_grained_activation_offloading or self.config.activation_func_fp8_input_store
        padded = getattr(self.config, "moe_use_grouped_tensor", False)  # exists in newer versions only
        self.is_plain = takes_grouped_experts(self.config) and not (recomputed or rest or offloaded or padded)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        **buffers: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply each expert to its pairs; Megatron runs experts that are not plain SwiGLU.

        Args:
            permuted_local_hidden_states: `[P, H]`, sorted by local expert.
            tokens_per_expert: int64 `[L]`, on the host.
            permuted_probs: `[P]`, the gates.
            buffers: Megatron's.

        Returns:
            `[P, H]`, and no bias.
        """
        if not self.is_plain:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs, **buffers)
        sizes = tokens_per_expert.tolist()
        hidden, _ = apply_module(self.linear_fc1)(permuted_local_hidden_states, sizes)
        output, _ = apply_module(self.linear_fc2)(SwiGLU.apply(hidden, permuted_probs, self.backend), sizes)
        return output, None
