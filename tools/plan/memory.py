"""Estimate the memory of one GPU: weights, gradients, optimizer and activations of a pipeline stage.

Context parallelism divides a micro-batch's tokens among GPUs. Sequence parallelism further divides the tokens of some
tensors by the tensor parallel size. Activations are the large tensors that autograd saves with SwiGLU, rotary
embeddings and fused layers. Adam's moments are counted in fp32. tests/tools/test_rehearse.py compares the sum with
rehearsals of the launch scripts.
"""

import argparse
from typing import NamedTuple

from megatron.core.num_microbatches_calculator import get_num_microbatches

from ..recipes.flops import key_value_heads
from .parameters import Stage

NOT_COUNTED = (
    "the CUDA context, NCCL's buffers, temporary tensors and fragmentation, together some GiB;",
    "nor what layers without fusion keep in addition (--no-local-layer-fusion)",
)
RECOMPUTED_PARTS = {  # name in --recompute-modules: parts of `layer_parts` that it drops
    "layernorm": {"norms"},
    "mlp": {"mlp"},
    "moe": {"router", "experts", "shared experts"},
    "shared_experts": {"shared experts"},
}


class LayerActivations(NamedTuple):
    """Bytes that a layer keeps of one micro-batch until its backward pass, and that this pass recomputes."""

    kept: float
    recomputed: float


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float


def element_size(args: argparse.Namespace) -> int:
    """Return the bytes per element of activations and weights."""
    return 2 if args.bf16 or args.fp16 else 4


def layer_parts(args: argparse.Namespace, sublayers: str, experts_per_token: float) -> dict[str, float]:
    """Return part of a layer → bytes that it keeps of one micro-batch, if nothing is recomputed.

    Args:
        args: Megatron's validated arguments.
        sublayers: the layer as --hybrid-layer-pattern writes it: * attention, - MLP, E experts.
        experts_per_token: active experts of a token.
    """
    tokens, split = _tokens(args), _split_tokens(args)
    per_rank = tokens / args.tensor_model_parallel_size
    is_local = args.transformer_impl == "local"
    parts = dict.fromkeys(("residual", "norms"), len(sublayers) * args.hidden_size * split)  # before each sublayer
    if "*" in sublayers:
        query, key = args.kv_channels * args.num_attention_heads, args.kv_channels * key_value_heads(args)
        rotated = query + key if is_local else 0  # local layers also keep the queries and keys before rotation
        parts["attention"] = (2 * query + 2 * key + rotated) * per_rank  # with the output
    # SwiGLU keeps its two inputs and its output; grouped local experts recompute the output.
    if "-" in sublayers:
        parts["mlp"] = 3 * args.ffn_hidden_size * per_rank
    if "E" in sublayers:
        pairs = experts_per_token * split
        is_in_place = is_local and args.expert_model_parallel_size == args.expert_tensor_parallel_size == 1
        inputs = 0 if is_in_place else args.hidden_size * pairs * args.expert_tensor_parallel_size
        parts["experts"] = inputs + (2 if is_local else 3) * args.moe_ffn_hidden_size * pairs
        parts["shared experts"] = 3 * (args.moe_shared_expert_intermediate_size or 0) * per_rank
    parts = {part: number * element_size(args) for part, number in parts.items()}
    if "E" in sublayers:
        parts["router"] = args.num_experts * split * (4 + 4 + 1)  # logits and gates in fp32, map
    return parts


def layer_activations(args: argparse.Namespace, sublayers: str, experts_per_token: float) -> LayerActivations:
    """Return a layer's bytes with recomputation and chunks of experts. Args: as in `layer_parts`.

    --recompute-method block counts as no recomputation, because not all layers need to use it.
    """
    limit = args.moe_relu_activation_limit * args.moe_router_topk
    in_chunks = _works_in_chunks(args, experts_per_token)
    parts = layer_parts(args, sublayers, limit if in_chunks else experts_per_token)
    if args.recompute_granularity == "full" and args.recompute_method == "uniform":
        inputs = args.hidden_size * _split_tokens(args) * element_size(args)
        return LayerActivations(inputs, sum(parts.values()) - inputs)
    dropped = {"experts"} if in_chunks else set()
    dropped |= {part for module in _recomputed_modules(args) for part in RECOMPUTED_PARTS.get(module, ())}
    recomputed = sum(size for part, size in parts.items() if part in dropped)
    return LayerActivations(sum(parts.values()) - recomputed, recomputed)


def stage_memory(args: argparse.Namespace, stages: list[Stage], index: int, experts_per_token: float) -> Memory:
    """Return the memory of a GPU of stage `index` with an even load of experts.

    `experts_per_token` experts are active in each MoE layer.
    """
    stage, parameters = stages[index], stages[index].shared + stages[index].experts
    per_stage = args.world_size // args.pipeline_model_parallel_size // args.num_distributed_optimizer_instances
    shared_copies = per_stage // args.tensor_model_parallel_size  # context parallel ranks share the optimizer too
    expert_copies = per_stage // (args.expert_tensor_parallel_size * args.expert_model_parallel_size)
    part = stage.shared / shared_copies + stage.experts / expert_copies
    is_sharded = args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer  # the second is Muon's
    on_gpu = 1 - args.optimizer_offload_fraction if args.optimizer_cpu_offload else 1
    return Memory(
        weights=element_size(args) * parameters,
        gradients=(4 if args.accumulate_allreduce_grads_in_fp32 else element_size(args)) * parameters,
        optimizer=on_gpu * _optimizer_bytes(args) * (part if is_sharded else parameters),
        activations=_stage_activations(args, stages, index, experts_per_token),
    )


def checkpoint_bytes(args: argparse.Namespace, parameters: int) -> float:
    """Return the bytes of one checkpoint on disk: weights and optimizer state of all parameters."""
    # The distributed optimizer saves its fp32 weights, even if they are the model's.
    again = 4 if args.use_distributed_optimizer and element_size(args) == 4 else 0
    return (element_size(args) + (0 if args.no_save_optim else _optimizer_bytes(args) + again)) * parameters


def exchanged_bytes(args: argparse.Namespace, stages: list[Stage], experts_per_token: float) -> float:
    """Return the bytes that a GPU sends to others in a step's exchanges of tokens.

    Each pair's vector travels there and back, and so does its gradient; recomputation sends the vectors again.
    `experts_per_token` experts are computed in each MoE layer. Allgather sends each token to all ranks instead.
    """
    layers = sum("E" in layer for stage in stages for layer in stage.layers)
    is_recomputed = args.recompute_granularity == "full" or "moe" in _recomputed_modules(args)
    passes = 6 if is_recomputed or _works_in_chunks(args, experts_per_token) else 4
    tokens = args.global_batch_size * args.seq_length / args.world_size
    ranks = args.expert_model_parallel_size
    copies = ranks - 1 if args.moe_token_dispatcher_type == "allgather" else experts_per_token * (1 - 1 / ranks)
    return passes * layers * tokens * copies * args.hidden_size * element_size(args)


def _tokens(args: argparse.Namespace) -> float:
    """Return the tokens of a micro-batch on one GPU, before sequence parallelism divides them."""
    return args.micro_batch_size * args.seq_length / args.context_parallel_size


def _split_tokens(args: argparse.Namespace) -> float:
    return _tokens(args) / (args.tensor_model_parallel_size if args.sequence_parallel else 1)


def _works_in_chunks(args: argparse.Namespace, experts_per_token: float) -> bool:
    return 0 < args.moe_relu_activation_limit * args.moe_router_topk < experts_per_token


def _recomputed_modules(args: argparse.Namespace) -> list[str]:
    return (args.recompute_modules or []) if args.recompute_granularity == "selective" else []


def _optimizer_bytes(args: argparse.Namespace) -> int:
    """Return bytes per parameter: Adam's two moments (SGD: one), and the fp32 weights of half-precision training."""
    return 4 * (1 if args.optimizer == "sgd" else 2) + 4 * (args.bf16 or args.fp16)


def _stage_activations(args: argparse.Namespace, stages: list[Stage], index: int, experts_per_token: float) -> float:
    layers = [layer_activations(args, layer, experts_per_token) for layer in stages[index].layers]
    total = sum(layer.kept for layer in layers) * _micro_batches_in_flight(args, index)
    recomputed, loss = max((layer.recomputed for layer in layers), default=0.0), 0.0
    if index == len(stages) - 1:
        size = element_size(args)
        loss = 2 * args.hidden_size * _split_tokens(args) * size  # before and after the last norm
        # The softmax in fp32 and the logits, or if fused, the gradient that replaces the logits.
        per_logit = size if args.cross_entropy_loss_fusion or size == 4 else 4 + size
        logits = args.padded_vocab_size * _tokens(args) / args.tensor_model_parallel_size
        loss += per_logit * logits * (1 + (args.mtp_num_layers or 0))
    return total + max(recomputed, loss)  # the loss's backward pass ends before the layers' begin


def _micro_batches_in_flight(args: argparse.Namespace, index: int) -> float:
    """Return how many micro-batches' activations the stage holds at once.

    These are the micro-batches of the pipeline's warm-up (Megatron's `get_pp_rank_microbatches`) and one more.
    """
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    if stages == 1:
        return 1
    warm_up = stages - index - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * stages
    return min(warm_up + 1, get_num_microbatches() * chunks) / chunks
