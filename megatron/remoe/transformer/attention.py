"""Compute Megatron's local attention with PyTorch's fused kernels."""

from contextlib import nullcontext

import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType


class FusedDotProductAttention(DotProductAttention):
    """`DotProductAttention` without scores `[sequence, sequence]` or repeated keys in memory.

    Megatron's class runs what PyTorch's kernels do not support: sliding windows, softmax offsets, scaling by layer.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Return the attention's output.

        Args:
            query: `[sequence, batch, heads, size]`.
            key, value: `[sequence, batch, query groups, size]`.
            attention_mask: bool, True where not to attend, broadcast to `[batch, heads, sequence, sequence]`. If None,
                a layer built with a causal mask type is causal, and any other layer has no mask. A single query (with
                a KV cache) attends to all keys. Two or more queries, but fewer than keys, need a mask.
            attn_mask_type, attention_bias, packed_seq_params: used by Megatron's class, which refuses the last two.

        Returns:
            `[sequence, batch, heads * size]`.
        """
        is_causal = attention_mask is None and len(query) > 1 and self.attn_mask_type == AttnMaskType.causal
        refused = attention_bias is not None or packed_seq_params is not None or (is_causal and len(query) != len(key))
        if refused or not self._is_plain():
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        dropout = self.attention_dropout.p if self.training else 0.0
        draws = dropout and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if draws else nullcontext():
            context = scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _is_plain(self) -> bool:
        softmax = self.scale_mask_softmax
        return self.softmax_offset is None and softmax.scale is None and softmax.window_size is None
