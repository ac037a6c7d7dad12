"""Count the training FLOPs of a model and of the stages of a run, for all tools.

Megatron's own `num_floating_point_operations` is not called. It counts attention over half of the square, counts no
routers, and needs arguments that older logs do not have. Importing it would add eight seconds to every tool that reads
a log. tests/tools/test_flops.py compares both functions for each kind of layer.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runs.run_figures import TOTALS, WITHIN, RunFigures

# Raised for arguments of an unknown type or layers that are not counted.
UNCOUNTED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
RISING = 0.1  # the dense stage ends after this share of the way from the first S to the target

CONVENTION = (
    "A product of m x k and k x n matrices counts 2mnk; backward counts twice forward; attention counts over the whole",
    "square of the sequence, causal or not; routers and the output layer are in; norms and lookups are not.",
)


def flops_per_sequence(args: argparse.Namespace, experts_per_token: float | None = None) -> float:
    """Return the training FLOPs of one sequence, counted as in the paper's table plus routers; see `CONVENTION`.

    With h the hidden size, s the sequence, n heads of d and g of keys and values, E experts of width f:
        attention h·d·(2n + 2g) + 2·s·n·d,  router h·E,  experts k·3·h·f,  output h·V
    multiply-adds of a token, times 2 for FLOPs, times 3 for forward and backward.

    Args:
        args: Megatron's validated arguments, or those of them that FLOPs depend on.
        experts_per_token: active experts of a token in each MoE layer; k if None.

    Raises:
        ValueError: the model has layers that are not counted here, such as Mamba.
    """
    args = _Defaulting(**vars(args))
    pattern, mtp = args.hybrid_layer_pattern, args.mtp_num_layers or 0
    if args.experimental_attention_variant or (pattern and set(pattern) - set("*-E|/")):
        kind = args.experimental_attention_variant or f"--hybrid-layer-pattern {pattern}"
        raise ValueError(f"FLOPs are counted for attention, MLP and experts only, not for {kind}")
    if pattern:
        mtp = pattern.rstrip("/").count("/")
        kinds = {kind: pattern.count(kind) for kind in "*-E"}
    else:
        experts = moe_layer_pattern(args)
        experts += experts[-1:] * mtp
        kinds = {"*": len(experts), "-": experts.count(False), "E": experts.count(True)}
    products = 3 if args.swiglu else 2
    token = kinds["*"] * _attention(args) + kinds["-"] * products * args.hidden_size * args.ffn_hidden_size
    if kinds["E"]:
        topk = args.moe_router_topk if experts_per_token is None else experts_per_token
        token += kinds["E"] * _experts(args, topk, products)
    token += (1 + mtp) * args.hidden_size * args.padded_vocab_size + mtp * 2 * args.hidden_size**2
    return 6.0 * args.seq_length * token


class _Defaulting(argparse.Namespace):
    """Arguments by name; None if a command or an older Megatron does not have one."""

    def __getattr__(self, name: str) -> Any:
        return None


def moe_layer_pattern(args: argparse.Namespace) -> list[bool]:
    """Return for each layer of a GPTModel whether it has experts: --moe-layer-freq as Megatron reads it.

    Args:
        args: Megatron's, or those saved in a checkpoint or a log; older ones do not have the flag.
    """
    frequency: int | list[int] | None = getattr(args, "moe_layer_freq", None)
    every = 1 if frequency is None else frequency
    pattern = every if isinstance(every, list) else [layer % every == 0 for layer in range(args.num_layers)]
    return [bool(args.num_experts and has_experts) for has_experts in pattern]


def key_value_heads(args: argparse.Namespace) -> int:
    """Return the number of heads of keys and values; Megatron's parser has 1 group without grouped queries."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _attention(args: _Defaulting) -> float:
    """Return the multiply-adds of a token in an attention layer."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    if args.multi_latent_attention:
        key, value = args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
        query = args.q_lora_rank * (hidden + heads * key) if args.q_lora_rank else hidden * heads * key
        latent = args.kv_lora_rank * (hidden + heads * (args.qk_head_dim + value)) + hidden * args.qk_pos_emb_head_dim
        return query + latent + heads * value * hidden + args.seq_length * heads * (key + value)
    head = args.kv_channels or hidden // heads
    projections = head * (heads * (3 if args.attention_output_gate else 2) + 2 * key_value_heads(args))
    return hidden * projections + 2 * args.seq_length * heads * head


def _experts(args: _Defaulting, topk: float, products: int) -> float:
    """Return the multiply-adds of a token in a layer of experts, router included."""
    hidden, latent = args.hidden_size, args.moe_latent_size
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    router = 0 if args.moe_baseline_router == "hash" else hidden * args.num_experts  # a hash router has no weights
    shared = hidden * (products * (args.moe_shared_expert_intermediate_size or 0) + bool(args.moe_shared_expert_gate))
    return router + shared + topk * products * (latent or hidden) * width + 2 * hidden * (latent or 0)


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of a sequence with k experts per token, and those of one more expert in every MoE layer."""

    sequence: float
    expert: float

    @classmethod
    def count(cls, args: Mapping[str, Any]) -> "Flops":
        """Count the FLOPs of a model with these arguments of Megatron.

        Raises:
            UNCOUNTED: an argument that the count needs is missing or has a different type, or the model has layers that
                are not counted.
        """
        named = argparse.Namespace(**args)
        sequence = flops_per_sequence(named)
        more = flops_per_sequence(named, named.moe_router_topk + 1) if getattr(named, "num_experts", None) else sequence
        return cls(sequence, more - sequence)


@dataclass(frozen=True)
class TrainingStage:
    """Iterations `first` to `last`: their time without evaluations and saves, FLOPs, and mean experts per token."""

    name: str
    first: int
    last: int
    hours: float
    flops: float
    experts: float


def stages(metrics: RunFigures, flops: Flops) -> list[TrainingStage]:
    """Return the dense stage, the way to the target (within 1 %) and the steady stage, as far as the log has them.

    Models without ReLU routing have one stage, "all". A line of the log covers the iterations since the previous line.
    """
    iterations, seconds = metrics.curve("seconds_per_iteration").iterations, metrics.seconds
    batches, target = metrics.batches(iterations), metrics.target_sparsity
    steps = np.diff(iterations, prepend=metrics.began)
    if target is None and TOTALS[0] not in metrics.curves:  # k experts per token, after a warm-up
        warmup, most = metrics.whole("moe_warmup_steps"), metrics.whole("moe_warmup_topk") or metrics.topk
        warming = np.diff(iterations.clip(max=warmup), prepend=min(metrics.began, warmup)) / np.maximum(steps, 1)
        experts = metrics.topk + (most - metrics.topk) * warming
    else:
        experts = metrics.experts_per_token(iterations)
    known = np.isfinite(batches) & np.isfinite(experts)
    if not known.any():
        return []
    iterations, seconds, batches, experts = iterations[known], seconds[known], batches[known], experts[known]
    steps, last = steps[known], int(iterations[-1])
    ends = [("all", last)]
    if target is not None:
        sparsity = metrics.values("sparsity", iterations)
        risen = sparsity - sparsity[0] > RISING * (target - sparsity[0])
        dense = int(iterations[risen.argmax() - 1]) if risen.any() else last  # the first line has not risen
        dense = 0 if sparsity[0] >= (1 - WITHIN) * target else dense
        way = 0 if metrics.first_near == iterations[0] else metrics.first_near or last
        ends = [("dense", dense), ("way", way), ("steady", last)]
    cost = steps * batches * (flops.sequence + (experts - metrics.topk) * flops.expert)
    stages_found, before = [], metrics.began
    for name, end in ends:
        lines = (before < iterations) & (iterations <= end)
        if lines.any():
            hours, mean = float(seconds[lines].sum()) / 3600, float(np.average(experts[lines], weights=steps[lines]))
            stages_found.append(TrainingStage(name, before + 1, end, hours, float(cost[lines].sum()), mean))
            before = end
    return stages_found


def training_flops(metrics: RunFigures) -> float | None:
    """Return the FLOPs of a whole run; None if the log misses arguments or first steps, or layers are not counted.

    The result is exact if the log has the running sums of computed pairs, as each line since version 0.1 does.
    """
    try:
        flops = Flops.count(metrics.args)
    except UNCOUNTED:
        return None
    stages_found = stages(metrics, flops)
    if not stages_found or metrics.began:
        return None
    unlogged = metrics.whole("train_iters") - stages_found[-1].last  # at the target
    return sum(stage.flops for stage in stages_found) + unlogged * metrics.whole("global_batch_size") * flops.sequence
