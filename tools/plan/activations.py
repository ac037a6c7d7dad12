"""Count the activations that a transformer layer keeps of one micro-batch for its backward pass, term by term.

T is the number of a micro-batch's tokens on one GPU; context parallelism divides it. Sequence parallelism divides it
once more, by the tensor parallel size. Each term is a tensor that the layer's autograd graph saves. Tests compare the
sum with PyTorch's.
"""

import argparse
from typing import NamedTuple

DENSE_SHARE = 0.5  # of the experts that are active before training
BELOW_LIMIT = 0.9  # of the bound on activations: the most at which no layer of a rehearsal works in chunks
TITLES = {"dense": "dense start", "way": "on the way", "steady": "at the target"}
RECOMPUTED_PARTS = {  # name in --recompute-modules: parts of `layer_parts` that it drops
    "core_attn": ("scores",),
    "layernorm": ("norms",),
    "mlp": ("mlp",),
    "moe": ("router", "expert inputs", "expert hidden", "expert activations", "shared experts"),
    "moe_act": ("expert activations",),
    "shared_experts": ("shared experts",),
}


class LayerActivations(NamedTuple):
    """Bytes that a layer keeps of one micro-batch.

    Attributes:
        kept: until the layer's backward pass.
        recomputed: additional ones during the layer's backward pass; one layer at a time.
    """

    kept: float
    recomputed: float


def experts_by_phase(args: argparse.Namespace) -> dict[str, float]:
    """Return the phases of a run, and the experts that each computes per token in every MoE layer.

    The phases are the dense start, the moment when layers stop using chunks ("way") if the start uses them, and the
    rest ("steady"). Only ReLU routing has more than one phase.

    Args:
        args: Megatron's validated arguments.
    """
    topk = float(args.moe_router_topk) if args.num_experts else 0.0
    if not (args.num_experts and args.moe_relu_routing):
        return {"steady": topk}
    dense = max(topk, min(DENSE_SHARE * args.num_experts, args.moe_relu_max_experts or args.num_experts))
    limit = args.moe_relu_activation_limit * topk
    way = {"way": BELOW_LIMIT * limit} if topk < limit < dense else {}
    return {"dense": dense, **way, "steady": topk}


def tokens_per_gpu(args: argparse.Namespace) -> float:
    """Return T (see the top of the file)."""
    return args.micro_batch_size * args.seq_length / args.context_parallel_size


def element_size(args: argparse.Namespace) -> int:
    """Return the bytes of an activation's element."""
    return 2 if args.bf16 or args.fp16 else 4


def recomputed_modules(args: argparse.Namespace) -> list[str]:
    """Return --recompute-modules if recomputation is selective, else nothing."""
    return args.recompute_modules or [] if args.recompute_granularity == "selective" else []


def layer_parts(args: argparse.Namespace, sublayers: str, experts_per_token: float) -> dict[str, float]:
    """Return bytes by part of the layer, with nothing recomputed.

    Args:
        args: Megatron's validated arguments.
        sublayers: the layer as --hybrid-layer-pattern writes it: * attention, - MLP, E experts.
        experts_per_token: active experts of a token.
    """
    size, tp = element_size(args), args.tensor_model_parallel_size
    tokens = tokens_per_gpu(args)
    split = tokens / tp if args.sequence_parallel else tokens
    hidden = args.hidden_size
    query = args.kv_channels * args.num_attention_heads
    key_value = 2 * args.kv_channels * args.num_query_groups
    local = args.transformer_impl == "local"
    fused = local and args.local_layer_fusion

    parts = dict.fromkeys(("residual", "norms"), len(sublayers) * hidden * split * size)  # before each sublayer
    if "*" in sublayers and args.multi_latent_attention:
        parts |= _latent_attention(args, tokens / tp * size, split * size)
    elif "*" in sublayers:
        parts["attention"] = (query + key_value) * tokens * size / tp
        parts["attention output"] = query * tokens * size / tp
        parts["scores"] = args.num_attention_heads * tokens * 4 / tp  # the log-sum-exp of flash attention
        if fused:  # the queries are copied; keys and values are views
            parts["attention"] += query * tokens * size / tp
        elif local:  # keys and values are repeated to all heads; the softmax's output is kept
            parts["attention"] = 3 * query * tokens * size / tp
            parts["scores"] = args.num_attention_heads * tokens * args.seq_length * size / tp
        if args.qk_layernorm:  # the queries before it, and keys that are no view; of all heads, both in fp32 and normed
            normed = (query + key_value / 2) * (4 / size + 1) if args.qk_layernorm_all_heads else query
            parts["attention"] += (normed + key_value / 2) * tokens * size / tp
    if "-" in sublayers:
        parts["mlp"] = _mlp(args, args.ffn_hidden_size) * tokens * size / tp
    if "E" not in sublayers:
        return parts

    pairs = experts_per_token * split
    # Grouped experts recompute all that follows the first product, and pick tokens by their numbers if they can.
    gathers = args.expert_model_parallel_size == args.expert_tensor_parallel_size == 1
    gathers = gathers and fused and args.swiglu and args.moe_token_dispatcher_type == "alltoall"
    gathers = gathers and not (args.moe_permute_fusion or args.moe_pad_expert_input_to_capacity)
    hidden_tensors, activations = (2, 0) if fused and args.swiglu else _mlp_tensors(args, gated=True)
    parts["router"] = args.num_experts * split * (4 + 4 + 1)  # logits and gates in fp32, map
    parts["expert inputs"] = 0.0 if gathers else hidden * pairs * args.expert_tensor_parallel_size * size
    parts["expert hidden"] = hidden_tensors * args.moe_ffn_hidden_size * pairs * size
    parts["expert activations"] = activations * args.moe_ffn_hidden_size * pairs * size
    if args.moe_shared_expert_intermediate_size:
        parts["shared experts"] = _mlp(args, args.moe_shared_expert_intermediate_size) * tokens * size / tp
        if args.moe_shared_expert_gate:
            parts["shared experts"] += hidden * split * size
    return parts


def _latent_attention(args: argparse.Namespace, bytes_per_head: float, bytes_per_token: float) -> dict[str, float]:
    """Return bytes by part.

    Args:
        args: Megatron's validated arguments.
        bytes_per_head: for one element of each head's tensors on this rank.
        bytes_per_token: for one element of the latents on this rank.
    """
    heads, key, value = args.num_attention_heads, args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
    latents = 2 * (args.kv_lora_rank + (args.q_lora_rank or 0)) + args.qk_pos_emb_head_dim  # before and after norms
    # Plain PyTorch layers pad values to the size of keys, and keep the padded output too.
    padded = key if args.transformer_impl == "local" and value < key else 0
    return {
        "attention": heads * (2 * key + (padded or value)) * bytes_per_head + latents * bytes_per_token,
        "attention output": heads * (value + padded) * bytes_per_head,
        "scores": heads * 4 * bytes_per_head / element_size(args),
    }


def _mlp_tensors(args: argparse.Namespace, gated: bool = False) -> tuple[int, int]:
    """Return the numbers of saved tensors of shape [tokens, ffn] before the activation, and from it on.

    Fused kernels recompute the steps in backward. Unfused, SwiGLU keeps silu(x), the linear half and the product;
    experts also keep the product with the gate.
    """
    before = 2 if args.swiglu else 1
    if args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion:
        return before, 1
    unfused = 3 if args.swiglu else 1
    return before, unfused + 1 if gated else unfused


def _mlp(args: argparse.Namespace, size: int) -> int:
    return sum(_mlp_tensors(args)) * size


def layer_activations(args: argparse.Namespace, sublayers: str, experts_per_token: float) -> LayerActivations:
    """Return the bytes of a layer with the arguments' recomputation; see `layer_parts`."""
    bounded = "E" in sublayers and args.moe_relu_routing
    limit = args.moe_relu_activation_limit * args.moe_router_topk if bounded else 0.0
    in_chunks = 0.0 < limit < experts_per_token
    parts = layer_parts(args, sublayers, limit if in_chunks else experts_per_token)
    everything = sum(parts.values())
    if args.recompute_granularity == "full":
        inputs = parts["residual"] / len(sublayers)
        return LayerActivations(inputs, everything - inputs)
    dropped = {part for module in recomputed_modules(args) for part in RECOMPUTED_PARTS.get(module, ())}
    if in_chunks:
        dropped |= {"expert inputs", "expert hidden", "expert activations"}
    recomputed = sum(size for part, size in parts.items() if part in dropped)
    return LayerActivations(everything - recomputed, recomputed)
