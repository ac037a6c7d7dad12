"""Estimate the memory of one GPU: weights, gradients, optimizer and activations of a pipeline stage.

Context parallelism divides a micro-batch's tokens among GPUs. Sequence parallelism further divides the tokens of some
tensors by the tensor parallel size. Each term of a layer's activations is a tensor that its autograd graph saves; tests
compare the sum with what PyTorch saves.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import NamedTuple

from megatron.core.num_microbatches_calculator import get_num_microbatches

from ..recipes.flops import key_value_heads
from .parameters import Stage

NOT_COUNTED = "the CUDA context, NCCL's buffers, temporary tensors and fragmentation, together some GiB"
RECOMPUTED_PARTS = {  # name in --recompute-modules: parts of `layer_parts` that it drops
    "core_attn": ("scores",),
    "layernorm": ("norms",),
    "mlp": ("mlp",),
    "moe": ("router", "expert inputs", "expert hidden", "expert activations", "shared experts"),
    "moe_act": ("expert activations",),
    "shared_experts": ("shared experts",),
}


class LayerActivations(NamedTuple):
    """Bytes that a layer, or a group of layers, keeps of one micro-batch.

    Attributes:
        kept: until the layer's backward pass.
        recomputed: added during its backward pass.
        again: sublayers whose forward pass runs twice, in the letters of --hybrid-layer-pattern.
    """

    kept: float
    recomputed: float
    again: str


def tokens_per_gpu(args: argparse.Namespace) -> float:
    """Return the tokens of a micro-batch on one GPU, before sequence parallelism divides them."""
    return args.micro_batch_size * args.seq_length / args.context_parallel_size


def element_size(args: argparse.Namespace) -> int:
    """Return the bytes per element of activations and weights."""
    return 2 if args.bf16 or args.fp16 else 4


def gradient_size(args: argparse.Namespace) -> int:
    """Return the bytes per element of Megatron's gradient buffers."""
    return 4 if args.accumulate_allreduce_grads_in_fp32 else element_size(args)


def shards_optimizer(args: argparse.Namespace) -> bool:
    """Return whether data parallel ranks share the optimizer's state."""
    # The second is Muon's.
    return bool(args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer)


def layer_parts(args: argparse.Namespace, sublayers: str, experts_per_token: float) -> dict[str, float]:
    """Return part of a layer → bytes that it keeps of one micro-batch, if nothing is recomputed.

    Args:
        args: Megatron's validated arguments.
        sublayers: the layer as --hybrid-layer-pattern writes it: * attention, - MLP, E experts.
        experts_per_token: active experts of a token.
    """
    size, tp = element_size(args), args.tensor_model_parallel_size
    tokens = tokens_per_gpu(args)
    split = tokens / tp if args.sequence_parallel else tokens
    hidden = args.hidden_size
    parts = dict.fromkeys(("residual", "norms"), len(sublayers) * hidden * split * size)  # before each sublayer
    if "*" in sublayers:
        parts |= _attention(args, tokens / tp * size)
    if "-" in sublayers:
        parts["mlp"] = sum(_mlp_tensors(args)) * args.ffn_hidden_size * tokens * size / tp
    if "E" not in sublayers:
        return parts

    pairs = experts_per_token * split
    fused = _has_local_fusion(args)
    # Grouped experts recompute everything after the first product. If possible, they index tokens without a copy.
    gathers = (
        args.expert_model_parallel_size == args.expert_tensor_parallel_size == 1
        and fused
        and args.swiglu
        and args.moe_token_dispatcher_type == "alltoall"
        and not (args.moe_permute_fusion or args.moe_pad_expert_input_to_capacity or args.moe_shared_expert_overlap)
    )
    hidden_tensors, activations = (2, 0) if fused and args.swiglu else _mlp_tensors(args, gated=True)
    parts["router"] = args.num_experts * split * (4 + 4 + 1)  # logits and gates in fp32, map
    parts["expert inputs"] = 0.0 if gathers else hidden * pairs * args.expert_tensor_parallel_size * size
    parts["expert hidden"] = hidden_tensors * args.moe_ffn_hidden_size * pairs * size
    parts["expert activations"] = activations * args.moe_ffn_hidden_size * pairs * size
    if args.moe_shared_expert_intermediate_size:
        shared = sum(_mlp_tensors(args)) * args.moe_shared_expert_intermediate_size
        parts["shared experts"] = shared * tokens * size / tp
        if args.moe_shared_expert_gate:
            parts["shared experts"] += hidden * split * size
    return parts


def _has_local_fusion(args: argparse.Namespace) -> bool:
    return args.transformer_impl == "local" and args.local_layer_fusion


def _attention(args: argparse.Namespace, bytes_per_element: float) -> dict[str, float]:
    """Return part → bytes of attention on this rank.

    Args:
        args: Megatron's validated arguments.
        bytes_per_element: bytes of one element per token of the heads, divided by the tensor parallel size.
    """
    query, key = args.kv_channels * args.num_attention_heads, args.kv_channels * key_value_heads(args)
    elements = query + 2 * key
    scores = args.num_attention_heads * 4 / element_size(args)  # the log-sum-exp of flash attention
    rotated = args.position_embedding_type in ("rope", "yarn") and not args.qk_layernorm
    if _has_local_fusion(args):
        # Values are views. Rotary embeddings copy queries and keys; query groups and norms copy only queries.
        copied = rotated or args.group_query_attention or args.qk_layernorm
        elements += query * copied + key * rotated
    elif args.transformer_impl == "local":  # keys and values are repeated to all heads; the softmax's output is kept
        elements, scores = 3 * query, args.num_attention_heads * args.seq_length
    if args.qk_layernorm:  # queries before the norm, and copied keys
        elements += key + query
    parts = {"attention": elements, "attention output": query, "scores": scores}
    return {part: number * bytes_per_element for part, number in parts.items()}


def _mlp_tensors(args: argparse.Namespace, gated: bool = False) -> tuple[int, int]:
    """Return the numbers of saved tensors of shape [tokens, ffn]: before the activation, and after it.

    Fused kernels recompute the steps in backward. Unfused SwiGLU keeps silu(x), the linear half and the product;
    `gated` experts also keep the product with the gate.
    """
    before, after, is_fused = (2, 3, args.bias_swiglu_fusion) if args.swiglu else (1, 1, args.bias_gelu_fusion)
    if is_fused:
        return before, 1
    return before, after + 1 if gated else after


def layer_activations(args: argparse.Namespace, sublayers: str, experts_per_token: float) -> LayerActivations:
    """Return a layer's bytes with selective recomputation and chunks of experts. Args: as in `layer_parts`."""
    limit = args.moe_relu_activation_limit * args.moe_router_topk if "E" in sublayers else 0.0
    in_chunks = 0.0 < limit < experts_per_token
    parts = layer_parts(args, sublayers, limit if in_chunks else experts_per_token)
    everything = sum(parts.values())
    modules = args.recompute_modules or ["core_attn"] if args.recompute_granularity == "selective" else []
    dropped = {part for module in modules for part in RECOMPUTED_PARTS.get(module, ())}
    if in_chunks:
        dropped |= {"expert inputs", "expert hidden", "expert activations"}
    recomputed = sum(size for part, size in parts.items() if part in dropped)
    again = "".join(kind for kind in sublayers if {"E": "expert hidden", "-": "mlp"}.get(kind) in dropped)
    return LayerActivations(everything - recomputed, recomputed, again)


def group_activations(args: argparse.Namespace, layers: Sequence[str], experts: float) -> Iterator[LayerActivations]:
    """Yield the bytes of each layer of a stage, or of each group that Megatron's core/recompute.py checkpoints."""
    is_full, is_uniform = args.recompute_granularity == "full", args.recompute_method == "uniform"
    size, length = args.recompute_num_layers if is_full and is_uniform else 1, len(layers) or 1
    tokens = tokens_per_gpu(args) / (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    inputs = args.hidden_size * tokens * element_size(args)
    for stage in batched(layers, -(-length // (args.virtual_pipeline_model_parallel_size or 1))):
        for number, group in enumerate(batched(stage, size)):
            kept, recomputed, again = zip(*(layer_activations(args, layer, experts) for layer in group), strict=True)
            total = LayerActivations(sum(kept), max(recomputed), "".join(again))
            if is_full and (is_uniform or number < args.recompute_num_layers):
                total = LayerActivations(inputs, total.kept - inputs + total.recomputed, "".join(group))
            yield total


class Memory(NamedTuple):
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float


def stage_memory(args: argparse.Namespace, stages: list[Stage], index: int, experts_per_token: float) -> Memory:
    """Return the memory of a GPU of stage `index` with an even load of experts.

    `experts_per_token` experts are active in each MoE layer.
    """
    stage, parameters = stages[index], stages[index].shared + stages[index].experts
    per_stage = args.world_size // args.pipeline_model_parallel_size // args.num_distributed_optimizer_instances
    shared_copies = per_stage // args.tensor_model_parallel_size  # context parallel ranks share the optimizer too
    expert_copies = per_stage // (args.expert_tensor_parallel_size * args.expert_model_parallel_size)
    part = stage.shared / shared_copies + stage.experts / expert_copies
    on_gpu = 1 - args.optimizer_offload_fraction if args.optimizer_cpu_offload else 1
    return Memory(
        weights=element_size(args) * parameters,
        gradients=gradient_size(args) * parameters,
        optimizer=on_gpu * _optimizer_bytes(args) * (part if shards_optimizer(args) else parameters),
        activations=_activations(args, stages, index, experts_per_token),
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
    groups = [group for stage in stages for group in group_activations(args, stage.layers, experts_per_token)]
    again = sum(group.again.count("E") for group in groups)
    tokens = args.global_batch_size * args.seq_length / args.world_size
    ranks = args.expert_model_parallel_size
    copies = ranks - 1 if args.moe_token_dispatcher_type == "allgather" else experts_per_token * (1 - 1 / ranks)
    return (4 * layers + 2 * again) * tokens * copies * args.hidden_size * element_size(args)


def _optimizer_bytes(args: argparse.Namespace) -> int:
    """Return bytes per parameter: Adam's two moments (SGD: one), and the fp32 weights of half-precision training."""
    if args.use_precision_aware_optimizer:
        return sum(dtype.itemsize for dtype in (args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype))
    return 4 * (1 if args.optimizer == "sgd" else 2) + 4 * (args.bf16 or args.fp16)


def _activations(args: argparse.Namespace, stages: list[Stage], index: int, experts_per_token: float) -> float:
    groups = [*group_activations(args, stages[index].layers, experts_per_token)]
    total = sum(group.kept for group in groups) * _micro_batches_in_flight(args, index)
    recomputed, loss = max((group.recomputed for group in groups), default=0.0), 0.0
    if index == len(stages) - 1:
        tokens, tensor_parallel = tokens_per_gpu(args), args.tensor_model_parallel_size
        split = tokens / tensor_parallel if args.sequence_parallel else tokens
        size, predictions = element_size(args), args.mtp_num_layers or 0
        # Before and after the last norm. Multi-token prediction also keeps its embeddings, the embeddings joined with
        # the hidden state, the inputs of two more norms, and a tensor with all outputs.
        loss = (2 + 6 * predictions) * args.hidden_size * split * size
        softmax = size if args.cross_entropy_loss_fusion else 4  # fused: the logits' gradient replaces them
        per_logit = softmax * (1 + predictions) + size * (softmax > size)
        loss += per_logit * args.padded_vocab_size * tokens / tensor_parallel
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
        warm_up = 2 * warm_up + (chunks - 1) * (args.microbatch_group_size_per_vp_stage or stages)
        warm_up += args.overlap_moe_expert_parallel_comm
    return min(warm_up + 1, get_num_microbatches() * chunks) / chunks
