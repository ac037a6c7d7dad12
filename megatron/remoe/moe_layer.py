"""Megatron's MoE layer for a varying number of experts per token, in bounded memory while there are many."""

import math
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.dispatcher import VariableTopkAlltoAllTokenDispatcher, count_pairs
from megatron.remoe.experts import GroupedExperts
from megatron.remoe.router import ReLURouter


class _OwnGradient(torch.autograd.Function):
    """Nothing, but its gradient is a copy: the allgather dispatcher gives that of every chunk in the same buffer."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clone()


class ReMoELayer(MoELayer):
    """`MoELayer` whose alltoall dispatcher takes any routing map; its router comes with `submodules`.

    While routing is dense it works through its tokens in chunks, whose activations are computed again in the backward
    pass, so that it never holds more token-expert pairs than `moe_relu_activation_limit` times those of the target.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.tp_ep_group = pg_collection.tp_ep
        self.ep_size, self.expert_tp_size = pg_collection.ep.size(), pg_collection.expt_tp.size()
        self.activation_limit: float = getattr(config, "moe_relu_activation_limit", 0.0)
        if config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = VariableTopkAlltoAllTokenDispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
            )
            if not isinstance(self.router, ReLURouter) and config.moe_expert_capacity_factor is None:
                self.token_dispatcher.fixed_topk = config.moe_router_topk
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
            has_all_experts = self.ep_size == self.expert_tp_size == 1 and isinstance(self.experts, GroupedExperts)
            self.token_dispatcher.experts_gather = has_all_experts and not self.token_dispatcher.is_megatrons()
        for parameter in self.experts.parameters():
            # An optimizer of their own for experts: Megatron has it with expert parallelism only, and then cannot load
            # the optimizer's state from a checkpoint without.
            parameter.allreduce = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: tuple[torch.Tensor, ...] | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's.

        Args:
            hidden_states: `[sequence, batch, hidden]`.
            intermediate_tensors: as Megatron's, for parts of the layer in CUDA graphs.
            padding_mask: bool `[batch, sequence]`, True at padding.

        Returns:
            `[sequence, batch, hidden]` and no bias.
        """
        if not self.activation_limit or intermediate_tensors is not None:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._forward_bounded, False, hidden_states, padding_mask), None
        return self._forward_bounded(hidden_states, padding_mask), None

    def _forward_bounded(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        shared_expert_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, padding_mask)
        chunks = self._plan_chunks(routing_map)
        if chunks == 1:
            output = self._routed(hidden_states, probs, routing_map)
        else:
            tokens = hidden_states.view(-1, 1, hidden_states.shape[-1])
            # One that is re-entrant would give the experts' gradients, and reduce them, chunk by chunk.
            run = partial(checkpoint, self._routed_chunk, use_reentrant=False, preserve_rng_state=False)
            parts = zip(*(whole.tensor_split(chunks) for whole in (tokens, probs, routing_map)), strict=True)
            outputs = [run(*part, number == 0) for number, part in enumerate(parts)]
            output = torch.cat(outputs).view_as(hidden_states)
        return output if shared_expert_output is None else output + shared_expert_output

    def _routed(self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor) -> torch.Tensor:
        """`[sequence, batch, hidden]` → the experts' sum, of that shape."""
        hidden_states, probs = self.preprocess(hidden_states, probs, routing_map)
        dispatched, probs = self.dispatch(hidden_states, probs)
        output, _ = self.routed_experts_compute(dispatched, probs)
        return self.postprocess(self.combine(output), None)

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's; grouped experts that are all on this rank pick their tokens themselves, a block at a time.

        Args:
            hidden_states: `[pairs, hidden]` from the dispatcher, or all tokens.
            probs: `[pairs]`.

        Returns:
            `[pairs, hidden]`, or each token's sum, and no bias.
        """
        dispatcher = self.token_dispatcher
        if not getattr(dispatcher, "experts_gather", False):
            return super().routed_experts_compute(hidden_states, probs)
        return self.experts(hidden_states, dispatcher.tokens_per_expert, probs, dispatcher.rows)

    def _routed_chunk(
        self, tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, is_first: bool
    ) -> torch.Tensor:
        self.experts.gives_gradient = is_first  # its backward pass is the last one
        try:
            return self._routed(_OwnGradient.apply(tokens), probs, routing_map)
        finally:
            self.experts.gives_gradient = True

    def _plan_chunks(self, routing_map: torch.Tensor) -> int:
        """The smallest number of chunks that is found in which no rank sends or receives too many pairs."""
        num_tokens = routing_map.shape[0]
        assert self.config.moe_router_topk is not None
        limit = self.activation_limit * self.config.moe_router_topk * num_tokens
        chunks = 1
        while True:
            counts = count_pairs(routing_map, chunks, self.tp_ep_group)
            # A rank has the experts of one slice, and the tokens of its tensor parallel partners.
            received = counts.sum(dim=0).view(chunks, self.ep_size, -1).sum(dim=2) / self.expert_tp_size
            pairs = max(counts.sum(dim=2).flatten().tolist() + received.flatten().tolist())
            if pairs <= limit or chunks == num_tokens:
                break
            chunks = min(num_tokens, max(chunks + 1, math.ceil(chunks * pairs / limit)))
        if chunks == 1 and isinstance(self.token_dispatcher, VariableTopkAlltoAllTokenDispatcher):
            self.token_dispatcher.counts = counts
        return chunks
