"""Self-attention of public models that Megatron's classes cannot express, for plain and Transformer Engine layers."""

from typing import Any

import torch

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentAttention(MLASelfAttention):
    """Multi-head latent attention (MLA, arXiv 2405.04434) as DeepSeek's models have it.

    Gradients are complete under tensor parallelism. Plain layers have Transformer Engine's names in checkpoints.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.config.q_lora_rank and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            for weight in self.q_layernorm.parameters():  # each rank has the whole gradient, and Megatron sums them
                weight.register_hook(lambda gradient: gradient / self.tp_group.size())

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """Return the classes to build. Without --q-lora-rank, --qk-layernorm applies to keys and values only.

        For the queries, Megatron would normalize the layer's input a second time. DeepSeek's models do not, and
        Megatron has no plain PyTorch layer for it.
        """
        resolver = QKNormConfigResolver(self.config, submodules)
        if resolver.has_q_lora:
            return resolver.resolve()
        resolver.has_q_lora = True  # the classes of keys and values do not depend on it
        return resolver.resolve() | {"linear_q_proj": submodules.linear_q_proj, "q_layernorm": IdentityOp}

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries (or their latents), and the latents of keys and values for this rank's tokens.

        Plain PyTorch layers split the latents over the tensor parallel ranks. Megatron gathers the keys' rotated part
        for all tokens, and then the gradient of that part covers only this rank's heads. Without sequence parallelism,
        it does so with Transformer Engine's layers too.
        """
        queries, latents = super()._qkv_down_projection(hidden_states)
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if latents.size(-1) != sum(widths):
            latents = gather_from_tensor_model_parallel_region(latents)
            if self.config.sequence_parallel:
                latents = scatter_to_sequence_parallel_region(latents)
        if self.tp_group.size() > 1 and not self.config.sequence_parallel:
            rest, keys = latents.split(widths, dim=-1)
            latents = torch.cat([rest, copy_to_tensor_model_parallel_region(keys)], dim=-1)  # sums the ranks' gradients
        return queries, latents

    def sharded_state_dict(self, prefix: str = "", *arguments: Any, **options: Any) -> ShardedStateDict:
        """Return the weights under the names of Transformer Engine's layers."""
        state = super().sharded_state_dict(prefix, *arguments, **options)
        names = {f"{prefix}{kind}_layernorm.": f"{prefix}linear_{kind}_up_proj.layer_norm_" for kind in ("q", "kv")}
        apply_prefix_mapping(state, names)
        return state


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together, which are split over tensor parallel ranks: OLMoE's norm of queries and keys."""

    def __init__(self, heads: int, size: int, eps: float, tp_group: torch.distributed.ProcessGroup) -> None:
        """
        Args:
            heads: number of heads on all ranks; a ValueError is raised unless it is a multiple of the ranks.
            size: size of a head.
            eps: added to the mean square.
            tp_group: the ranks that share the heads, in order.
        """
        super().__init__()
        if heads % tp_group.size():
            raise ValueError(
                f"--qk-layernorm-all-heads: {tp_group.size()} tensor parallel ranks do not divide {heads} heads."
            )
        self.eps, self.tp_group = eps, tp_group
        # Each rank has the whole weight and uses its heads' part, as Megatron sums these norms' gradients over ranks.
        self.weight = torch.nn.Parameter(torch.ones(heads * size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalize `[sequence, batch, heads of this rank, size]`."""
        wide = states.flatten(-2).float()
        squares = reduce_from_tensor_model_parallel_region(wide.square().sum(-1, keepdim=True), self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)  # sums the ranks' gradients
        normed = wide * torch.rsqrt(squares / len(self.weight) + self.eps)
        weight = self.weight.chunk(self.tp_group.size())[self.tp_group.rank()]
        return (normed.to(states.dtype) * weight).view_as(states)


class AllHeadsNormAttention(SelfAttention):
    """`SelfAttention` with --qk-layernorm-all-heads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config, size = self.config, self.hidden_size_per_attention_head
        groups = config.num_query_groups or config.num_attention_heads
        for name, heads in (("q_layernorm", config.num_attention_heads), ("k_layernorm", groups)):
            setattr(self, name, AllHeadsNorm(heads, size, config.layernorm_epsilon, self.pg_collection.tp))
