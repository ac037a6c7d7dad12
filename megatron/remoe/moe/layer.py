"""Megatron's MoE layer for a varying number of experts per token, in bounded memory while there are many."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.kernels import wants_kernels
from megatron.remoe.local.experts import GroupedExperts
from megatron.remoe.local.grouped_swiglu import waits_for_sizes
from megatron.remoe.moe.dispatcher import PlannedAlltoAllDispatcher
from megatron.remoe.moe.plan import Counts, Ranks, count_bounded, count_pairs, plan_dispatch, plan_known


class _OwnGradient(torch.autograd.Function):
    """Nothing, but its gradient is a copy: the allgather dispatcher gives that of every chunk in the same buffer."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clone()


class ReMoELayer(MoELayer):
    """`MoELayer` that takes any routing map; its router comes with `submodules`, and may be Megatron's too.

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
        self.ranks = Ranks.of(pg_collection)
        self.kernels = wants_kernels(config)
        self.is_planned = takes_plans(config)
        if self.is_planned:
            self.token_dispatcher = PlannedAlltoAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config, pg_collection
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
        self.has_grouped_experts = isinstance(self.experts, GroupedExperts)
        is_alone = self.is_planned and self.ranks.is_alone
        self.experts_gather = is_alone and self.has_grouped_experts and not self.shared_expert_overlap
        # Top-k routers without dropped tokens, and experts that need no sizes on the host: nothing has to be counted
        # where no rank is told of it.
        varies = type(self.router) is not TopKRouter
        self.pairs_limit = _pairs_limit(config) if varies else 0.0
        has_fixed_topk = not varies and config.moe_expert_capacity_factor is None
        takes_any_sizes = self.has_grouped_experts and not waits_for_sizes(self.experts.fc1)
        self.known_topk = config.moe_router_topk if is_alone and has_fixed_topk and takes_any_sizes else None
        for parameter in self.experts.parameters():
            # An optimizer of their own for experts: Megatron has it with expert parallelism only, and then cannot load
            # the optimizer's state from a checkpoint without.
            parameter.allreduce = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: tuple[torch.Tensor, ...] | None = None,
        padding_mask: torch.Tensor | None = None,
        **for_router: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's.

        Args:
            hidden_states: `[sequence, batch, hidden]`.
            intermediate_tensors: as Megatron's, for parts of the layer in CUDA graphs.
            padding_mask: bool `[batch, sequence]`, True at padding.
            for_router: what some versions of Megatron hand to the router besides.

        Returns:
            `[sequence, batch, hidden]` and no bias.

        Raises:
            ValueError: in training with tensor parallelism and without sequence parallelism.
        """
        in_graphs = intermediate_tensors is not None or self.config.cuda_graph_impl != "none"
        if not self.pairs_limit and (in_graphs or not self.is_planned):
            return super().forward(hidden_states, intermediate_tensors, padding_mask, **for_router)
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("MoE layers with tensor parallelism train with sequence parallelism alone.")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        forward = partial(self._forward, for_router)
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(forward, False, hidden_states, padding_mask), None
        return forward(hidden_states, padding_mask), None

    def _forward(
        self, for_router: dict[str, Any], hidden_states: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        shared_expert_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, padding_mask, **for_router)
        counts = self._count(routing_map)
        if len(counts) == 1:
            output = self._routed(hidden_states, probs, routing_map, counts[0])
        else:
            tokens = hidden_states.view(-1, 1, hidden_states.shape[-1])
            # One that is re-entrant would give the experts' gradients, and reduce them, chunk by chunk.
            run = partial(
                checkpoint,
                self._routed_chunk,
                use_reentrant=False,
                preserve_rng_state=False,
                # HybridEP's manager keeps a dispatch's sizes until its tokens are combined.
                early_stop=self.config.moe_token_dispatcher_type != "flex",
            )
            wholes = (whole.tensor_split(len(counts)) for whole in (tokens, probs, routing_map))
            outputs = [run(*part, number == 0) for number, part in enumerate(zip(*wholes, counts, strict=True))]
            output = torch.cat(outputs).view_as(hidden_states)
        return output if shared_expert_output is None else output + shared_expert_output

    def _count(self, routing_map: torch.Tensor) -> list[Counts] | list[None]:
        """`count_pairs` for each chunk, as many as the bound asks for; one None where nothing has to be counted."""
        if self.pairs_limit:
            return count_bounded(routing_map, self.pairs_limit, self.ranks, self.kernels)
        return [None] if self.known_topk else count_pairs(routing_map, 1, self.ranks, self.kernels)

    def _routed(
        self,
        hidden_states: torch.Tensor,
        probs: torch.Tensor,
        routing_map: torch.Tensor,
        counts: Counts | None,
        gives_gradient: bool = True,
    ) -> torch.Tensor:
        """`[sequence, batch, hidden]` → the experts' sum, of that shape.

        Args:
            hidden_states, probs, routing_map: of all tokens or of a chunk.
            counts: of this routing map; None where nothing has to be counted.
            gives_gradient: see `grouped_swiglu`.
        """
        if not self.is_planned:
            tokens, gates = self.preprocess(hidden_states, probs, routing_map)
            return self.postprocess(self._exchanged(tokens, gates, gives_gradient), None)
        if counts is None:
            assert self.known_topk is not None
            plan = plan_known(probs, routing_map, self.known_topk, self.kernels)
        else:
            plan = plan_dispatch(probs, routing_map, counts, self.ranks, self.kernels)
        if self.experts_gather:
            tokens = hidden_states.view(-1, hidden_states.shape[-1])
            output, _ = self.experts(tokens, plan.tokens_per_expert, plan.gates, plan.order, gives_gradient)
            return output.view_as(hidden_states)
        tokens, gates = self.token_dispatcher.dispatch_preprocess(hidden_states, routing_map, probs, plan)
        return self.token_dispatcher.combine_postprocess(self._exchanged(tokens, gates, gives_gradient), plan)

    def _exchanged(self, tokens: torch.Tensor, gates: torch.Tensor, gives_gradient: bool) -> torch.Tensor:
        """`[pairs, hidden]`, `[pairs]` → what the experts of all ranks make of them, `[pairs, hidden]`."""
        tokens, gates = self.dispatch(tokens, gates)
        output, _ = self.routed_experts_compute(tokens, gates, gives_gradient)
        return self.combine(output)

    def routed_experts_compute(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, gives_gradient: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's.

        Args:
            hidden_states: `[pairs, hidden]` from the dispatcher.
            probs: `[pairs]`.
            gives_gradient: see `grouped_swiglu`; other experts do without.

        Returns:
            `[pairs, hidden]`, and no bias.
        """
        if not self.has_grouped_experts:
            return super().routed_experts_compute(hidden_states, probs)
        tokens, tokens_per_expert, gates = self.token_dispatcher.dispatch_postprocess(hidden_states, probs)
        output, _ = self.experts(tokens, tokens_per_expert, gates, gives_gradient=gives_gradient)
        return self.token_dispatcher.combine_preprocess(output), None

    def _routed_chunk(
        self,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        routing_map: torch.Tensor,
        counts: Counts,
        is_first: bool,
    ) -> torch.Tensor:
        # The first chunk's backward pass is the last one.
        return self._routed(_OwnGradient.apply(tokens), probs, routing_map, counts, gives_gradient=is_first)


def takes_plans(config: TransformerConfig) -> bool:
    """Whether tokens go by a plan; Megatron's own dispatchers are right for the rest."""
    permutes = config.moe_permute_fusion or config.moe_router_padding_for_quantization
    return config.moe_token_dispatcher_type == "alltoall" and not (permutes or config.moe_pad_expert_input_to_capacity)


def _pairs_limit(config: TransformerConfig) -> float:
    """The bound on activations in pairs per token; 0 where there is none, or none that could be exceeded."""
    pairs = getattr(config, "moe_relu_activation_limit", 0.0) * config.moe_router_topk
    assert config.num_moe_experts is not None
    return pairs if pairs < config.num_moe_experts else 0.0
