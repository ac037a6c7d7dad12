"""Find settings that cannot be used with ReLU routing, a near-dense warm-up or a baseline router."""

from collections.abc import Iterator
from dataclasses import replace

from megatron.remoe.routing.refusals import (
    CONFIG,
    DISPATCHERS,
    IGNORED,
    MOE_LAYER,
    REFUSALS,
    Refusal,
    Settings,
    as_list,
    shown,
)


def relu_routing_problems(settings: Settings) -> list[str]:
    """Return everything in `settings` that cannot be used with ReLU routing, a warm-up or a baseline router.

    Args:
        settings: Megatron's parsed arguments or a `ReMoEConfig`, read by attribute name.

    Returns:
        One message per problem: the flag, its value, the remedy and the code. Empty if all is well.
    """
    by_code = {
        "REMOE-E205": _values(settings) if settings.moe_relu_routing else (),
        "REMOE-E204": _refused(settings, "--moe-relu-routing") if settings.moe_relu_routing else (),
        "REMOE-E206": _warmup(settings),
        "REMOE-E207": _baseline(settings),
    }
    return [f"{problem} [{code}]" for code, problems in by_code.items() for problem in problems]


def _refused(settings: Settings, given: str) -> Iterator[str]:
    """Yield Megatron's settings that cannot be used with the router of the flag `given`.

    Warm-up uses the settings of top-k routing. A baseline router does not, and has nothing in their place.
    """
    yield from _combinations(settings, given)
    for refusal in REFUSALS:
        if refusal.reason == IGNORED and given == "--moe-warmup-topk":
            continue
        if refusal.reason == IGNORED and given != "--moe-relu-routing":
            refusal = replace(refusal, remedy="Leave it out")
        if problem := refusal.problem(settings, given):
            yield problem


def _baseline(settings: Settings) -> Iterator[str]:
    """Yield what cannot be used with a baseline router."""
    name = settings.moe_baseline_router
    if name is None:
        return
    given, is_hash = f"--moe-baseline-router {name}", name == "hash"
    other = "--moe-relu-routing" if settings.moe_relu_routing else "--moe-warmup-topk"
    depths = getattr(settings, "mtp_num_layers", None)
    stages = getattr(settings, "pipeline_model_parallel_size", 1)
    takes_turns = getattr(settings, "overlap_moe_expert_parallel_comm", False)
    problems = {
        f"{given} needs experts to route to: give --num-experts (for instance 8).": not _experts(settings),
        f"{other} cannot be used with {given}: each is a router of its own. Give one of them.": (
            settings.moe_relu_routing or settings.moe_warmup_topk is not None
        ),
        f"--mtp-num-layers {depths} cannot be used with {given}: its layers embed other ids, which all routers would "
        "take. Leave it out.": is_hash and depths,
        f"--pipeline-model-parallel-size {stages} cannot be used with {given}: only the first and the last stage have "
        "the tokens' ids. Leave it out.": is_hash and stages > 1,
        f"--overlap-moe-expert-parallel-comm (on) cannot be used with {given}: layers of two micro-batches take turns, "
        "and the router knows the ids of one. Leave it out.": is_hash and takes_turns,
    }
    yield from _refused(settings, given)
    yield from (problem for problem, holds in problems.items() if holds)


def _warmup(settings: Settings) -> Iterator[str]:
    """Yield what cannot be used with a near-dense warm-up, in which k changes."""
    topk, steps = settings.moe_warmup_topk, settings.moe_warmup_steps
    if topk is None and not steps:
        return
    experts = _experts(settings)
    if topk is None or steps < 1:
        yield "--moe-warmup-topk and --moe-warmup-steps belong together: give both, for instance 6 (of 8) and 100."
    elif not settings.moe_router_topk < topk <= experts:
        yield (
            f"--moe-warmup-topk {topk} must be above --moe-router-topk {settings.moe_router_topk} and at most "
            f"--num-experts {experts}."
        )
    if settings.moe_relu_routing:
        yield "--moe-warmup-topk cannot be used with --moe-relu-routing, which is dense at first anyway. Leave it out."
        return
    yield from _refused(settings, "--moe-warmup-topk")


def _experts(settings: Settings) -> int:
    """Return the number of experts; Megatron's arguments and configuration name it differently. 0 for dense models."""
    return getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None) or 0


def _expert_tensor_parallel(settings: Settings) -> int:
    """Return the ranks that share each expert: by Megatron's default, the tensor parallel ranks."""
    given = getattr(settings, "expert_tensor_parallel_size", None)
    return getattr(settings, "tensor_model_parallel_size", 1) if given is None else given


def _values(settings: Settings) -> Iterator[str]:
    """Yield settings of ReLU routing that are out of range."""
    experts = _experts(settings)
    topk, init = settings.moe_router_topk, settings.moe_relu_l1_reg_coeff_init
    multiplier, floor = settings.moe_relu_l1_reg_coeff_multiplier, settings.moe_relu_layer_floor
    limit, most = settings.moe_relu_activation_limit, settings.moe_relu_max_experts
    if not experts:
        yield "--moe-relu-routing needs experts to route to: give --num-experts (for instance 8)."
    elif not 0 < topk < experts:
        yield (
            f"--moe-router-topk {topk} must be at least 1 and below --num-experts {experts} with --moe-relu-routing: "
            "the target sparsity is 1 - topk/experts."
        )
    if not 0.0 < init < float("inf"):
        yield f"--moe-relu-l1-reg-coeff-init {init} must be a positive number (default 1e-8)."
    if not 1.0 < multiplier < float("inf"):
        yield f"--moe-relu-l1-reg-coeff-multiplier {multiplier} must be above 1 (default 1.2)."
    if not 0.0 <= floor < 1.0:
        yield f"--moe-relu-layer-floor {floor} must be at least 0 and below 1 (default 0.001, 0 turns it off)."
    if most is not None and experts and not settings.moe_router_topk <= most <= experts:
        yield (
            f"--moe-relu-max-experts {most} must be at least --moe-router-topk {settings.moe_router_topk} and at most "
            f"--num-experts {experts}."
        )
    if limit and not 1.0 <= limit < float("inf"):
        yield f"--moe-relu-activation-limit {limit} must be at least 1 (default 2), or 0 for no limit."


DEEPEP_SLOTS = 32  # a warp's lanes: the most experts of a token that its kernels take
ONE_DISPATCH = "a layer that works in chunks has no single dispatch to overlap with"
# PyTorch's checkpoint runs a chunk again without fp8_autocast. Transformer Engine's would, but keeps the scales of
# delayed scaling in the order of the forward passes, while chunks go backward from the last.
QUANTIZED = "chunks of a layer are computed again outside of the quantized part"
INSIDE_EXPERTS = {"expert_fc1", "moe_act", "fused_group_mlp"}
RECOMPUTED = "--fine-grained-activation-offloading would keep activations that a chunk computes again"
OR_NO_CHUNKS = "Leave it out, or add --moe-relu-activation-limit 0"
NOT_IN_CHUNKS = (
    Refusal("moe_shared_expert_overlap", ONE_DISPATCH, DISPATCHERS, OR_NO_CHUNKS),
    Refusal("overlap_moe_expert_parallel_comm", ONE_DISPATCH, DISPATCHERS, OR_NO_CHUNKS),
    Refusal("overlap_dispatch_backward_with_experts_wgrad", ONE_DISPATCH, DISPATCHERS, OR_NO_CHUNKS),
    Refusal("fp8", QUANTIZED, MOE_LAYER, OR_NO_CHUNKS),
    Refusal("fp4", QUANTIZED, MOE_LAYER, OR_NO_CHUNKS),
    Refusal("offload_modules", RECOMPUTED, CONFIG, OR_NO_CHUNKS, lambda value: not INSIDE_EXPERTS.isdisjoint(value)),
)


def _combinations(settings: Settings, given: str) -> Iterator[str]:
    """Yield settings that are refused in combination."""
    backend = getattr(settings, "moe_flex_dispatcher_backend", None)
    if getattr(settings, "moe_token_dispatcher_type", None) == "flex" and backend != "hybridep":
        experts = settings.moe_relu_max_experts or _experts(settings)
        slots = experts * _expert_tensor_parallel(settings)
        if backend != "deepep" or slots > DEEPEP_SLOTS:
            yield (
                f"--moe-token-dispatcher-type flex with its backend {backend} cannot be used with {given}: "
                f"a token may need {slots} slots, and the backend drops what does not fit. Use "
                f"--moe-flex-dispatcher-backend hybridep, deepep with --moe-relu-max-experts of at most {DEEPEP_SLOTS} "
                "(times granularity and expert tensor parallelism), or --moe-token-dispatcher-type alltoall."
            )
    if settings.moe_relu_activation_limit:
        problems = (refusal.problem(settings, "--moe-relu-activation-limit") for refusal in NOT_IN_CHUNKS)
        yield from filter(None, problems)
    tensor_parallel = getattr(settings, "tensor_model_parallel_size", 1)
    is_hybrid = getattr(settings, "hybrid_layer_pattern", None) or getattr(settings, "is_hybrid_model", False)
    if getattr(settings, "mtp_num_layers", None) and not is_hybrid:
        if settings.sequence_parallel and tensor_parallel > 1 and settings.transformer_impl == "local":
            yield (
                f"--mtp-num-layers {settings.mtp_num_layers} cannot be used with {given}, --sequence-parallel and "
                "--transformer-impl local: Megatron builds its layers with PyTorch's norms, which refuse it. Use "
                "--transformer-impl transformer_engine, or no tensor parallelism."
            )
        if getattr(settings, "pipeline_model_parallel_layout", None):
            yield (
                f"--mtp-num-layers {settings.mtp_num_layers} cannot be used with {given} and "
                "--pipeline-model-parallel-layout: only the first and the last stage get tokens and embeddings here. "
                "Leave the layout out."
            )
    if tensor_parallel > 1 and not settings.sequence_parallel:
        yield (
            f"--tensor-model-parallel-size {tensor_parallel} cannot be used with {given} and without "
            "--sequence-parallel: each rank would count the same tokens. Add --sequence-parallel."
        )
    graphs = getattr(settings, "cuda_graph_impl", None)
    modules = as_list(getattr(settings, "cuda_graph_modules", None) or "full")  # without modules Megatron takes layers
    has_moe = any(str(getattr(module, "name", module)).startswith(("moe", "full")) for module in modules)
    captures = {
        "full_iteration": True,
        # Of GPTModel's layers, which hold attention and experts, attn takes all: create_mcore_cudagraph_manager.
        "local": has_moe or not is_hybrid,
        "transformer_engine": has_moe,
    }
    if captures.get(graphs or "none"):
        yield (
            f"--cuda-graph-impl {graphs} with --cuda-graph-modules {shown(modules)} cannot be used with {given}: the "
            "number of routed pairs changes from step to step. Use --cuda-graph-impl none, or local with "
            "--cuda-graph-modules attn and a --hybrid-layer-pattern."
        )
