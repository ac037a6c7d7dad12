"""Megatron's MoE layer for a varying number of experts per token, in bounded memory.

T tokens (sequence x batch), E experts, P pairs (a token and an expert that is active for it), H hidden size.

    forward → _forward: route → count → for each chunk of tokens: run the experts in one of three ways

    in place      one rank has all experts    plan → experts(tokens, order): take → SwiGLU → sum
    planned       all-to-all                  plan, take → dispatch → experts → combine → sum
    Megatron's    allgather, HybridEP         preprocess → dispatch → experts → combine → postprocess

A layer within `moe_relu_activation_limit` has one chunk. One above it has more, also at the target sparsity, which is a
mean over layers and ranks; `layer_chunks` in SAVE/metrics.jsonl shows them.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules, te_checkpoint
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.kernels.backend import choose_backend
from megatron.remoe.layer.counting import ChunkCounts, count_pairs
from megatron.remoe.layer.dispatcher import PlannedAlltoAllDispatcher
from megatron.remoe.layer.experts import GroupedExperts
from megatron.remoe.routing.router import ReLURouter


class ReMoELayer(MoELayer):
    """`MoELayer` for any routing map. Its router comes with `submodules`; Megatron's top-k router works too.

    A layer with more than `moe_relu_activation_limit` times the target's number of pairs runs its tokens in chunks and
    recomputes their activations in the backward pass, so it never holds more.

    Attributes:
        pairs_limit: this limit in pairs per token; 0 for none.
        is_planned: whether its dispatcher is a `PlannedAlltoAllDispatcher`; otherwise it is Megatron's.
        is_in_place: whether the experts take the tokens and sum the pairs themselves; nothing is sent.
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
        captured = [module.name for module in config.cuda_graph_modules]
        if captured and not any(name.startswith("moe") for name in captured):
            # With local graphs, Megatron recomputes only in graphs of MoE modules.
            self.moe_layer_recompute = config.recompute_granularity == "selective" and "moe" in config.recompute_modules
        self.backend = choose_backend(config)
        # Megatron's top-k router never has more than k pairs per token.
        self.pairs_limit = 0.0 if type(self.router) is TopKRouter else _pairs_limit(config)
        self.is_planned = supports_plans(config)
        if self.is_planned:
            self.token_dispatcher = PlannedAlltoAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config, pg_collection
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
        is_alone = self.token_dispatcher.tp_ep_group.size() == 1 and not self.shared_expert_overlap
        self.is_in_place = self.is_planned and is_alone and isinstance(self.experts, GroupedExperts)
        is_fused = config.use_transformer_engine_op_fuser  # it recomputes without freeing
        self._frees_activations = getattr(self.experts, "activation_recompute", False) and not is_fused
        _prepare_experts(self.experts)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: tuple[torch.Tensor, ...] | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Route the tokens, and return the sum of their experts.

        Args:
            hidden_states: `[sequence, batch, H]`.
            intermediate_tensors: passed by Megatron if parts of the layer are in CUDA graphs.
            padding_mask: bool `[batch, sequence]`, True at padding.

        Returns:
            `[sequence, batch, H]`, and None for no bias.

        Raises:
            ValueError: the layer trains with tensor parallelism but without sequence parallelism.
        """
        in_graphs = intermediate_tensors is not None or self.config.cuda_graph_impl != "none"
        if not self.pairs_limit and (in_graphs or not self.is_planned):  # nothing to bound, and nothing to plan
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ValueError("MoE layers with tensor parallelism need sequence parallelism to train.")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        if self.moe_layer_recompute and self.training:
            if self.config.fp8 or self.config.fp4:  # only te_checkpoint recomputes in the same precision
                tracker = tensor_parallel.random.get_cuda_rng_tracker
                return te_checkpoint(self._forward, False, tracker, self.tp_group, hidden_states, padding_mask), None
            return tensor_parallel.checkpoint(self._forward, False, hidden_states, padding_mask), None
        return self._forward(hidden_states, padding_mask), None

    def _forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the output, `[sequence, batch, H]`; `padding_mask` is `[sequence, batch]` here."""
        shared_expert_output = self.shared_experts_compute(hidden_states)
        probs_TE, map_TE = self.route(hidden_states, padding_mask)
        counts_EB = getattr(self.router, "last_counts_EB", None)
        chunks = count_pairs(map_TE, counts_EB, self.token_dispatcher, self.backend, self.pairs_limit)
        if len(chunks) == 1:
            self._free_activations(True)
            output = self._run_experts(hidden_states, probs_TE, map_TE, chunks[0])
        else:
            if isinstance(self.router, ReLURouter):
                self.router.count_extra_chunks(len(chunks) - 1)
            output = self._run_chunks(hidden_states, probs_TE, map_TE, chunks)
        return output if shared_expert_output is None else output + shared_expert_output

    def preprocess(self, hidden_states: torch.Tensor, *routed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare the dispatch of tokens `[sequence, batch, H]` as Megatron does; `routed` are probs and map."""
        if self.config.moe_token_dispatcher_type == "allgather" and hidden_states.requires_grad:
            hidden_states = hidden_states.view_as(hidden_states)
            # Copy the gradient: the dispatcher keeps it in a buffer that other layers overwrite.
            hidden_states.register_hook(torch.clone)
        return super().preprocess(hidden_states, *routed)

    def _run_experts(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: ChunkCounts
    ) -> torch.Tensor:
        """Return the sum of each token's experts, `[sequence, batch, H]`.

        Args:
            hidden_states: `[sequence, batch, H]`.
            probs_TE: `[T, E]`, the gates.
            map_TE: bool `[T, E]`.
            counts: the counts of this map; Megatron's dispatchers compute their own.
        """
        if self.is_in_place:
            order, gates_P = self.backend.plan(probs_TE, map_TE, counts.counts_EB, counts.num_pairs)
            tokens_TH = hidden_states.view(-1, hidden_states.shape[-1])
            output, _ = self.experts(tokens_TH, counts.tokens_per_expert, gates_P, order)
            return output.view_as(hidden_states)
        if self.is_planned:
            self.token_dispatcher.counts = counts
        pairs_PH, gates_P = self.preprocess(hidden_states, probs_TE, map_TE)
        output, _ = self.routed_experts_compute(*self.dispatch(pairs_PH, gates_P))
        return self.postprocess(self.combine(output), None)

    def _run_chunks(
        self, hidden_states: torch.Tensor, probs_TE: torch.Tensor, map_TE: torch.Tensor, counts: list[ChunkCounts]
    ) -> torch.Tensor:
        """Run the experts chunk by chunk, and recompute each chunk in the backward pass."""

        def run_chunk(tokens: torch.Tensor, *chunk: Any) -> torch.Tensor:
            self._free_activations(False)  # the checkpoint already recomputes them
            return self._run_experts(tokens, *chunk)

        run = partial(
            checkpoint,
            run_chunk,
            # A re-entrant checkpoint would reduce the experts' gradients once per chunk.
            use_reentrant=False,
            preserve_rng_state=False,
            # HybridEP's manager keeps the sizes of a dispatch until combine, so recomputation must run up to combine.
            early_stop=self.config.moe_token_dispatcher_type != "flex",
        )
        tokens = hidden_states.view(-1, 1, hidden_states.shape[-1])
        if self.config.gradient_accumulation_fusion and not isinstance(self.experts, GroupedExperts):
            tokens = _ZeroGradients.apply(tokens, *self.experts.parameters())
        n = len(counts)
        chunks = zip(tokens.tensor_split(n), probs_TE.tensor_split(n), map_TE.tensor_split(n), counts, strict=True)
        return torch.cat([run(*chunk) for chunk in chunks]).view_as(hidden_states)

    def _free_activations(self, frees: bool) -> None:
        """Turn --recompute-modules moe_act on or off if the user gave it."""
        if self._frees_activations:
            self.experts.activation_recompute = frees


def _prepare_experts(experts: torch.nn.Module) -> None:
    """Make experts load and train the same way in every layout."""
    for parameter in experts.parameters():
        # By default, experts have their own optimizer only with expert parallelism, and the optimizer state
        # would fail to load under a different expert parallel size.
        parameter.allreduce = False  # type: ignore[attr-defined]
    if isinstance(experts, SequentialMLP):
        for expert in experts.local_experts:
            if isinstance(expert.linear_fc2, tensor_parallel.RowParallelLinear):
                # Megatron adds the bias in place to the result of a reduction. With one rank, the result is the input
                # itself, which autograd does not allow to be changed. Skip this reduction.
                expert.linear_fc2.explicit_expert_comm = True


class _ZeroGradients(torch.autograd.Function):
    """Identity of the tokens that gives the weights a zero gradient after the backward passes of all chunks.

    A checkpoint saves weights without their attributes, so layers that add to `main_grad` return no gradient for them.
    Megatron's hook needs one to reduce `main_grad`: see `mark_as_added`.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.weights = weights
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(weight.new_zeros(()).expand_as(weight) for weight in ctx.weights)


def supports_plans(config: TransformerConfig) -> bool:
    """Return whether `PlannedAlltoAllDispatcher` supports the configuration; otherwise Megatron's dispatcher runs."""
    rearranges = config.moe_permute_fusion or config.moe_router_padding_for_quantization or config.moe_latent_size
    is_captured = CudaGraphModule.moe_preprocess in config.cuda_graph_modules  # the host cannot read the counts
    return config.moe_token_dispatcher_type == "alltoall" and not (
        rearranges or is_captured or config.moe_pad_expert_input_to_capacity
    )


def _pairs_limit(config: TransformerConfig) -> float:
    """Return the activation limit in pairs per token; 0 if there is none, or if no token could exceed it."""
    pairs = getattr(config, "moe_relu_activation_limit", 0.0) * config.moe_router_topk
    assert config.num_moe_experts is not None
    return pairs if pairs < config.num_moe_experts else 0.0
