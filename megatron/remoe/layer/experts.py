"""Experts with stacked weights: one grouped product replaces a small layer per expert.

T tokens, P pairs (of a token and one of its experts), L experts on this rank, H hidden size, F the experts' FFN size
(with expert tensor parallelism, this rank's part).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import divide
from megatron.remoe.kernels.backend import choose_backend
from megatron.remoe.kernels.interface import Order
from megatron.remoe.kernels.pytorch import SortedPairs
from megatron.remoe.layer.grouped_swiglu import grouped_swiglu


def supports_grouped_experts(config: TransformerConfig) -> bool:
    """Return whether `GroupedExperts` supports the configuration: bias-free SwiGLU without any further option."""
    return bool(
        config.gated_linear_unit
        and config.activation_func is silu
        and not config.add_bias_linear
        and config.activation_func_clamp_value is None
        and not config.glu_linear_offset
        and not config.moe_apply_probs_on_input
        and not config.moe_latent_size
        and not config.use_cpu_initialization
        and not (config.fp8 or config.fp4)
    )


class GroupedExperts(MegatronModule):
    """Replace Megatron's `SequentialMLP`; results, initial weights and checkpoints are the same.

    Attributes:
        fc1: `[L, 2 * F, H]`, gate and up.
        fc2: `[L, H, F]`.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        """
        Args:
            num_local_experts: L.
            config: accepted by `supports_grouped_experts`.
            pg_collection: has the groups `ep`, `expt_tp` and `expt_dp`.
        """
        super().__init__(config=config)
        self.num_local_experts, self.backend = num_local_experts, choose_backend(config)
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        assert config.moe_ffn_hidden_size is not None
        ffn, hidden = divide(config.moe_ffn_hidden_size, self.tp_group.size()), config.hidden_size
        device = torch.cuda.current_device()

        def parameter(rows: int, columns: int, parallel_dim: int, stride: int) -> torch.nn.Parameter:
            weight = torch.nn.Parameter(
                torch.empty(num_local_experts, rows, columns, dtype=config.params_dtype, device=device)
            )
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=parallel_dim, stride=stride)
            weight.allreduce = False  # type: ignore[attr-defined]
            return weight

        self.fc1 = parameter(2 * ffn, hidden, parallel_dim=1, stride=2)
        self.fc2 = parameter(hidden, ffn, parallel_dim=2, stride=1)
        if config.perform_initialization:
            # Draw expert by expert, as `SequentialMLP` does, so that the weights are equal.
            with torch.no_grad(), get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for expert_fc1, expert_fc2 in zip(self.fc1, self.fc2, strict=True):
                    config.init_method(expert_fc1)
                    config.output_layer_init_method(expert_fc2)
        self._register_load_state_dict_pre_hook(self._stack_sequential)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        order: Order | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Apply each expert to its tokens.

        Args:
            permuted_local_hidden_states: `[P, H]`, sorted by local expert; with an `order`, all tokens, `[T, H]`.
            tokens_per_expert: integers `[L]`.
            permuted_probs: `[P]`, the gates, sorted by local expert.
            order: maps these tokens to their pairs and back.

        Returns:
            `[P, H]`, or with an `order` each token's sum `[T, H]`; with expert tensor parallelism, this rank's part of
            the sum. And None, for no bias.
        """
        order, sizes = SortedPairs() if order is None else order, tokens_per_expert.tolist()
        inputs = permuted_local_hidden_states, permuted_probs, self.fc1, self.fc2
        return grouped_swiglu(*inputs, sizes, order, self.backend), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are never delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the weights under the keys and in the global shapes of `SequentialMLP`: `[..., experts, out, in]`."""
        axis = len(sharded_offsets)
        experts = (axis, self.ep_group.rank(), self.ep_group.size())
        rank, size = self.tp_group.rank(), self.tp_group.size()

        def shard(key: str, tensor: torch.Tensor, split: tuple[int, int, int], replica_id: ReplicaId) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key, tensor, *sharded_offsets, experts, split, replica_id=replica_id, prepend_axis_num=axis
            )

        @torch.no_grad()
        def gate_and_up(
            key: str, tensor: torch.Tensor, replica_id: ReplicaId, _flattened_range: slice | None
        ) -> list[ShardedTensor]:
            # Each rank has a part of gate and a part of up; the whole tensor has all of gate, then all of up.
            return [
                shard(key, half, (axis + 1, rank + number * size, 2 * size), replica_id)
                for number, half in enumerate(tensor.chunk(2, dim=1))
            ]

        def join(halves: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(halves, dim=1)

        replica_id = (0, 0, self.dp_group.rank())
        key = f"{prefix}experts.linear_fc"
        state: ShardedStateDict = {
            f"{prefix}fc1": ShardedTensorFactory(f"{key}1.weight", self.fc1, gate_and_up, join, replica_id),
            f"{prefix}fc2": shard(f"{key}2.weight", self.fc2, (axis + 2, rank, size), replica_id),
        }
        for expert in range(self.num_local_experts):
            number = self.ep_group.rank() * self.num_local_experts + expert
            offsets = (*sharded_offsets, (axis, number, self.ep_group.size() * self.num_local_experts))
            for name in ("linear_fc1", "linear_fc2"):
                # `SequentialMLP` expects this entry, though it is empty.
                state[f"{prefix}local_experts.{expert}.{name}._extra_state"] = make_sharded_object_for_checkpoint(
                    None, f"{prefix}experts.{name}._extra_state", offsets, (0, rank, self.dp_group.rank())
                )
        return state

    def _stack_sequential(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Stack the weights in the state of a `SequentialMLP` before they are loaded."""
        for name in ("fc1", "fc2"):
            keys = [f"{prefix}local_experts.{i}.linear_{name}.weight" for i in range(self.num_local_experts)]
            if all(key in state_dict for key in keys):
                state_dict[prefix + name] = torch.stack([state_dict.pop(key) for key in keys])
            for key in keys:
                state_dict.pop(key.replace(".weight", "._extra_state"), None)


def build_experts(
    num_local_experts: int,
    config: TransformerConfig,
    *,
    pg_collection: ProcessGroupCollection,
    name: str | None = None,
    stock: Callable[..., torch.nn.Module],
) -> torch.nn.Module:
    """Build `GroupedExperts` if they support the configuration, otherwise call `stock`, Megatron's builder."""
    if not supports_grouped_experts(config):
        return stock(num_local_experts, config, pg_collection=pg_collection, name=name)
    return GroupedExperts(num_local_experts, config, pg_collection)
