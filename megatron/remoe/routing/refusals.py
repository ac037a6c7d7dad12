"""What ReLU routing cannot be combined with, as one table.

Every entry is a Megatron setting that assumes exactly k experts per token, that would drop or invent
token-expert pairs, or that would silently be ignored. The attribute names are those of Megatron's parsed arguments,
which its `TransformerConfig` shares, so the table serves the command line and the library alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Settings = Any  # argparse.Namespace or TransformerConfig: both are read by attribute name


@dataclass(frozen=True)
class Refusal:
    """One refused setting.

    Attributes:
        name: attribute that holds the setting; the flag is derived from it.
        refused: tells from the attribute's value whether it is refused.
        reason: what would go wrong.
        where: file and function of megatron-core 0.19.2 that show it.
        remedy: what to do instead.
    """

    name: str
    refused: Callable[[Any], bool]
    reason: str
    where: str
    remedy: str = "Leave it out"

    def problem(self, settings: Settings, beside: str = "--moe-relu-routing") -> str | None:
        """The message for `settings` beside a flag, or None where they are fine or do not have the attribute."""
        value = getattr(settings, self.name, None)
        if value is None or not self.refused(value):
            return None
        return f"{flag(self.name)} {shown(value)} cannot be used with {beside}: {self.reason}. {self.remedy}."


SPELLED = {"fp8": "--fp8-format", "fp4": "--fp4-format"}
ONLY_CONFIGURED = ("moe_token_dropping", "moe_router_topk_limited_devices", "use_inference_optimized_layers")


def flag(name: str) -> str:
    """Megatron's spelling of an attribute on the command line; the name of a field that has no flag."""
    return name if name in ONLY_CONFIGURED else SPELLED.get(name, "--" + name.replace("_", "-"))


def shown(value: Any) -> str:
    """A value as a user would type it (nothing for a switch)."""
    if value is True:
        return "(on)"
    if isinstance(value, list | tuple):
        return " ".join(shown(item) for item in value)
    return str(getattr(value, "name", value))


def _given(_value: Any) -> bool:
    return True


def _moe_graph_scope(modules: Any) -> bool:
    return any(str(getattr(item, "name", item)).startswith("moe") for item in _as_list(modules))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


ADDS_PAIRS = "it adds token-expert pairs that were not routed"
BALANCED = "The L1 term balances the load: leave it out"
DROPLESS = "Leave it out: ReMoE is dropless"
FIXED_K = "it drops tokens or pads them to a fixed number"
IGNORED = "it belongs to top-k routing and has no effect"
OTHER_CLASS = "Megatron replaces the configuration class for it"
QUANTIZED = "recomputing chunks of a layer needs Transformer Engine's checkpoint"
TOPK_SPEC = "its router and dispatcher compute top-k"
UNTESTED_STATE = "it is not tested with the router's state"

CONFIG = "core/transformer/transformer_config.py: TransformerConfig"
DISPATCHERS = "core/transformer/moe/token_dispatcher.py"
EXPERTS = "core/transformer/moe/experts.py: TEGroupedMLP"
INFERENCE_SPEC = "core/models/gpt/moe_module_specs.py: get_inference_optimized_moe_spec"
MOE_LAYER = "core/transformer/moe/moe_layer.py: MoELayer.forward"
MOE_UTILS = "core/transformer/moe/moe_utils.py"
ROUTING = "core/transformer/moe/router.py: TopKRouter.routing"
WRAPPING = "training/models/dist_utils.py"
SETTINGS = "training/argument_utils.py: core_transformer_config_from_args"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "moe_expert_capacity_factor", _given, FIXED_K, f"{MOE_UTILS}: apply_router_token_dropping", remedy=DROPLESS
    ),
    Refusal(
        "moe_pad_expert_input_to_capacity",
        bool,
        FIXED_K,
        f"{DISPATCHERS}: MoEAlltoAllTokenDispatcher.preprocess",
        DROPLESS,
    ),
    Refusal(
        "moe_pad_experts_for_cuda_graph_inference",
        bool,
        FIXED_K,
        "core/inference/utils.py: set_decode_expert_padding",
        DROPLESS,
    ),
    Refusal("moe_token_dropping", bool, FIXED_K, CONFIG, DROPLESS),
    Refusal(
        "moe_expert_rank_capacity_factor", _given, FIXED_K, f"{DISPATCHERS}: _HybridEPManager.setup_metadata", DROPLESS
    ),
    Refusal("moe_paged_stash", bool, "its buffers are sized for k experts per token", f"{EXPERTS}._fused_forward"),
    Refusal(
        "moe_permute_fusion",
        bool,
        "Transformer Engine's permutation fails if a layer routes no token",
        f"{MOE_UTILS}: permute",
        "Leave it out: tokens are not sorted, so there is nothing to fuse",
    ),
    Refusal(
        "moe_enable_deepep",
        bool,
        "DeepEP sends exactly k experts per token",
        f"{DISPATCHERS}: _DeepepManager.setup_metadata",
    ),
    Refusal(
        "moe_enable_routing_replay",
        bool,
        "replay records k experts per token",
        f"{MOE_UTILS}: topk_routing_with_score_function",
    ),
    Refusal(
        "moe_apply_probs_on_input",
        bool,
        "it assumes one expert per token",
        f"{EXPERTS}.forward",
        "Leave it out: the gate scales the expert's output",
    ),
    Refusal("moe_router_padding_for_quantization", bool, ADDS_PAIRS, f"{MOE_UTILS}: pad_routing_map"),
    Refusal("fp8", bool, QUANTIZED, MOE_LAYER, "Use --bf16"),
    Refusal("fp4", bool, QUANTIZED, MOE_LAYER, "Use --bf16"),
    Refusal("moe_aux_loss_coeff", lambda value: any(_as_list(value)), IGNORED, ROUTING, BALANCED),
    Refusal("moe_router_enable_expert_bias", bool, IGNORED, ROUTING, BALANCED),
    Refusal(
        "moe_router_load_balancing_type",
        lambda value: not set(_as_list(value)) <= {"none", "aux_loss"},
        IGNORED,
        ROUTING,
        "The L1 term balances the load: use --moe-router-load-balancing-type none or leave it out",
    ),
    Refusal(
        "moe_router_score_function",
        lambda value: value != "softmax",
        IGNORED,
        ROUTING,
        "Leave it out: the score is ReLU",
    ),
    Refusal("moe_router_topk_scaling_factor", _given, IGNORED, ROUTING),
    Refusal("moe_router_num_groups", _given, IGNORED, ROUTING),
    Refusal("moe_router_group_topk", _given, IGNORED, ROUTING),
    Refusal("moe_router_topk_limited_devices", _given, IGNORED, CONFIG),
    Refusal("moe_router_fusion", bool, "the fused kernel computes top-k", ROUTING),
    Refusal(
        "moe_router_force_biased",
        _given,
        "its random bias changes the number of experts",
        f"{MOE_UTILS}: apply_biased_logits",
    ),
    Refusal(
        "moe_router_force_load_balancing",
        bool,
        "random logits do not activate k experts",
        f"{MOE_UTILS}: apply_random_logits",
    ),
    Refusal(
        "moe_use_upcycling",
        bool,
        "it scales the experts for a softmax",
        "core/transformer/moe/upcycling_utils.py: _convert_to_moe_state_dict",
        "Use tools/convert_checkpoint, which fits the gates",
    ),
    Refusal(
        "moe_latent_size",
        _given,
        "planned dispatch would skip the latent projections",
        "core/transformer/moe/moe_layer.py: MoELayer.preprocess",
    ),
    Refusal(
        "cuda_graph_impl",
        lambda value: value == "full_iteration",
        "shapes change with the number of routed pairs",
        "core/full_cuda_graph.py: FullCudaGraphWrapper",
        "Use --cuda-graph-impl none",
    ),
    Refusal(
        "transformer_impl",
        lambda value: value == "inference_optimized",
        TOPK_SPEC,
        INFERENCE_SPEC,
        "Use --transformer-impl transformer_engine or local",
    ),
    Refusal("use_inference_optimized_layers", bool, TOPK_SPEC, INFERENCE_SPEC),
    Refusal("multi_latent_attention", bool, OTHER_CLASS, SETTINGS),
    Refusal("heterogeneous_layers_config_path", _given, OTHER_CLASS, SETTINGS),
    Refusal("heterogeneous_layers_config_encoded_json", _given, OTHER_CLASS, SETTINGS),
    Refusal("use_megatron_fsdp", bool, UNTESTED_STATE, f"{WRAPPING}: _ddp_wrap"),
    Refusal("use_torch_fsdp2", bool, UNTESTED_STATE, f"{WRAPPING}: _ddp_wrap"),
    Refusal(
        "init_model_with_meta_device",
        bool,
        "weights stay uninitialized without Megatron's FSDP",
        f"{WRAPPING}: to_empty_if_meta_device",
    ),
)


def relu_routing_problems(settings: Settings) -> list[str]:
    """Return everything in `settings` that cannot be used with ReLU routing, a warm-up or a baseline router.

    Args:
        settings: Megatron's parsed arguments or a `ReMoEConfig`, read by attribute name.

    Returns:
        One message per problem: the flag, its value, the remedy and the code. Empty if all is well.
    """
    values: list[str] = []
    combined: list[str] = []
    if settings.moe_granularity < 1:
        values.append(f"--moe-granularity {settings.moe_granularity} must be a whole number of at least 1.")
    if settings.moe_relu_routing:
        values.extend(_values(settings))
        combined.extend(_combinations(settings))
        combined.extend(problem for refusal in REFUSALS if (problem := refusal.problem(settings)))
    by_code = {
        "REMOE-E205": values,
        "REMOE-E204": combined,
        "REMOE-E206": _warmup(settings),
        "REMOE-E207": _baseline(settings),
    }
    return [f"{problem} [{code}]" for code, problems in by_code.items() for problem in problems]


def _baseline(settings: Settings) -> Iterator[str]:
    """What does not go with a baseline router, which has no weights, or none that Megatron's settings reach."""
    name = settings.moe_baseline_router
    if name is None:
        return
    beside = f"--moe-baseline-router {name}"
    if settings.moe_relu_routing or settings.moe_warmup_topk is not None:
        other = "--moe-relu-routing" if settings.moe_relu_routing else "--moe-warmup-topk"
        yield f"{other} cannot be used with {beside}: each is a router of its own. Give one of them."
    for refusal in REFUSALS:
        ignored = refusal.reason == IGNORED
        if problem := (replace(refusal, remedy="Leave it out") if ignored else refusal).problem(settings, beside):
            yield problem
    yield from _combinations(settings, beside)
    stages = getattr(settings, "pipeline_model_parallel_size", 1)
    if name == "hash" and stages > 1:
        yield (
            f"--pipeline-model-parallel-size {stages} cannot be used with {beside}: only the first and the last stage "
            "have the tokens' ids. Leave it out."
        )
    if name == "hash" and getattr(settings, "overlap_moe_expert_parallel_comm", False):
        yield (
            f"--overlap-moe-expert-parallel-comm (on) cannot be used with {beside}: layers of two micro-batches take "
            "turns, and the router knows the ids of one. Leave it out."
        )


def _warmup(settings: Settings) -> Iterator[str]:
    """What does not go with a near-dense warm-up, in which k changes."""
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
    refused = (refusal.problem(settings, "--moe-warmup-topk") for refusal in REFUSALS if refusal.reason != IGNORED)
    yield from filter(None, refused)
    yield from _combinations(settings, "--moe-warmup-topk")


def _experts(settings: Settings) -> int:
    """Megatron's parsed arguments call them otherwise than its configuration does; 0 for dense models."""
    return getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None) or 0


def _values(settings: Settings) -> Iterator[str]:
    """What is out of range in the settings of ReLU routing itself."""
    experts = _experts(settings)
    topk, init = settings.moe_router_topk, settings.moe_relu_l1_reg_coeff_init
    multiplier, floor = settings.moe_relu_l1_reg_coeff_multiplier, settings.moe_relu_layer_floor
    limit = settings.moe_relu_activation_limit
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
    if limit and not 1.0 <= limit < float("inf"):
        yield f"--moe-relu-activation-limit {limit} must be at least 1 (default 2), or 0 for no limit."


def _combinations(settings: Settings, beside: str = "--moe-relu-routing") -> Iterator[str]:
    """Settings of Megatron's that are refused together with others."""
    backend = getattr(settings, "moe_flex_dispatcher_backend", None)
    if getattr(settings, "moe_token_dispatcher_type", None) == "flex" and backend != "hybridep":
        yield (
            f"--moe-token-dispatcher-type flex with its backend {backend} cannot be used with {beside}: "
            "it sends the k largest gates of a token and drops the others. Use --moe-flex-dispatcher-backend hybridep, "
            "or --moe-token-dispatcher-type alltoall (or allgather)."
        )
    for overlap in ("moe_shared_expert_overlap", "overlap_dispatch_backward_with_experts_wgrad"):
        if settings.moe_relu_activation_limit and getattr(settings, overlap, False):
            yield (
                f"{flag(overlap)} (on) cannot be used with --moe-relu-activation-limit: a layer that works in chunks "
                "has no single dispatch to overlap with. Leave it out, or add --moe-relu-activation-limit 0."
            )
    is_hybrid = getattr(settings, "hybrid_layer_pattern", None) or getattr(settings, "is_hybrid_model", False)
    if getattr(settings, "mtp_num_layers", None) and not is_hybrid:
        if settings.sequence_parallel and settings.transformer_impl == "local":
            yield (
                f"--mtp-num-layers {settings.mtp_num_layers} cannot be used with {beside}, --sequence-parallel and "
                "--transformer-impl local: Megatron builds its layers with PyTorch's norms, which refuse it. Use "
                "--transformer-impl transformer_engine, or no tensor parallelism."
            )
        if getattr(settings, "pipeline_model_parallel_layout", None):
            yield (
                f"--mtp-num-layers {settings.mtp_num_layers} cannot be used with {beside} and "
                "--pipeline-model-parallel-layout: only the first and the last stage get tokens and embeddings here. "
                "Leave the layout out."
            )
    tensor_parallel = getattr(settings, "tensor_model_parallel_size", 1)
    if tensor_parallel > 1 and not settings.sequence_parallel:
        yield (
            f"--tensor-model-parallel-size {tensor_parallel} cannot be used with {beside} and without "
            "--sequence-parallel: each rank would count the same tokens. Add --sequence-parallel."
        )
    if settings.moe_relu_router_bias and not settings.add_bias_linear:
        yield (
            "--moe-relu-router-bias (on) cannot be used with --disable-bias-linear, which leaves out all biases. "
            "Give one of them."
        )
    graphs = getattr(settings, "cuda_graph_modules", None) or []
    if getattr(settings, "cuda_graph_impl", None) not in (None, "none") and _moe_graph_scope(graphs):
        yield (
            f"--cuda-graph-modules {shown(graphs)} cannot be used with {beside}: the "
            "number of routed pairs changes from step to step. Keep only attention, or use --cuda-graph-impl none."
        )
