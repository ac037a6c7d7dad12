"""Settings that cannot be used with ReLU routing, a near-dense warm-up or a baseline router.

Most assume exactly k experts per token, drop or add token-expert pairs, or would be ignored silently. Megatron's own
refusals are not repeated: `--moe-paged-stash`, for example, needs a capacity factor. Megatron's parsed arguments and
its `TransformerConfig` share attribute names, so the tables serve the command line and the library. Comments name the
code of megatron-core 0.19.2 that causes a refusal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Settings = Any  # argparse.Namespace or TransformerConfig: both are read by attribute name


@dataclass(frozen=True)
class Refusal:
    """One refused setting.

    Attributes:
        name: attribute that holds the setting; the flag is derived from it.
        reason: what would go wrong.
        remedy: what to do instead.
        refused: whether a value of the attribute, other than None, is refused.
    """

    name: str
    reason: str
    remedy: str = "Leave it out"
    refused: Callable[[Any], bool] = bool

    def problem(self, settings: Settings, given: str) -> str | None:
        """Return the message if `settings` has a refused value, else None. `given` is the conflicting flag."""
        value = getattr(settings, self.name, None)
        if value is None or not self.refused(value):
            return None
        return f"{flag_name(self.name)} {shown(value)} cannot be used with {given}: {self.reason}. {self.remedy}."


def flag_name(name: str) -> str:
    """Return Megatron's spelling of an attribute on the command line."""
    return {"fp8": "--fp8-format", "fp4": "--fp4-format"}.get(name, "--" + name.replace("_", "-"))


def shown(value: Any) -> str:
    """Return a value as a user would type it, and (on) for a switch."""
    if value is True:
        return "(on)"
    if isinstance(value, list | tuple):
        return " ".join(shown(item) for item in value)
    return str(getattr(value, "name", value))


def as_list(value: Any) -> list[Any]:
    """Return a list or tuple as a list, and any other value in a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _any_value(_value: Any) -> bool:
    return True


DROPS, DROPLESS = "it drops or pads tokens", "Leave it out: routing is dropless"
IGNORED = "it acts on top-k only"  # router.py: TopKRouter.routing

REFUSALS: tuple[Refusal, ...] = (
    # moe_utils.py: apply_router_token_dropping, pad_routing_map; token_dispatcher.py: _HybridEPManager.setup_metadata
    Refusal("moe_expert_capacity_factor", DROPS, DROPLESS, _any_value),
    Refusal("moe_expert_rank_capacity_factor", DROPS, DROPLESS, _any_value),
    Refusal("moe_router_padding_for_quantization", "it adds token-expert pairs that were not routed"),
    # moe_utils.py: permute
    Refusal("moe_permute_fusion", "Transformer Engine's permutation fails if a layer routes no token"),
    # moe_utils.py: topk_routing_with_score_function; router_trace.py: RouterTracer._record
    Refusal("moe_enable_routing_replay", "replay records k experts per token"),
    Refusal("moe_routing_trace_path", "it records exactly k experts per token", refused=_any_value),
    # experts.py: TEGroupedMLP.forward
    Refusal("moe_apply_probs_on_input", "it assumes one expert per token", "Leave it out: gates scale the outputs"),
    Refusal("moe_aux_loss_coeff", IGNORED, refused=lambda value: any(as_list(value))),
    Refusal(
        "moe_router_load_balancing_type",
        IGNORED,
        "Use --moe-router-load-balancing-type none or leave it out",
        lambda value: not set(as_list(value)) <= {"none", "aux_loss"},
    ),
    Refusal("moe_router_score_function", IGNORED, refused=lambda value: value != "softmax"),
    Refusal("moe_router_topk_scaling_factor", IGNORED, refused=_any_value),
    Refusal("moe_router_num_groups", IGNORED, refused=_any_value),
    Refusal("moe_router_fusion", "the fused kernel computes top-k"),
    # moe_utils.py: apply_biased_logits, apply_random_logits
    Refusal("moe_router_force_biased", "its random bias changes the number of experts", refused=_any_value),
    Refusal("moe_router_force_load_balancing", "random logits do not activate k experts"),
    # upcycling_utils.py: _convert_to_moe_state_dict
    Refusal("moe_use_upcycling", "it scales the experts for a softmax", "Use remoe convert, which fits the gates"),
    Refusal("moe_latent_size", "the planned dispatch does not project to the latent size", refused=_any_value),
    # transformer_layer.py: _forward_mlp
    Refusal("mlp_chunks_for_training", "it routes and balances parts of a sequence", refused=lambda parts: parts > 1),
    # param_and_grad_buffer.py: gradient_reduce_preprocessing; NVIDIA/Megatron-LM issues 4910 and 6660
    Refusal("use_megatron_fsdp", "it can compute wrong gradients of experts, and saving can hang"),
    # training/models/dist_utils.py: _ddp_wrap, to_empty_if_meta_device
    Refusal("use_torch_fsdp2", "it needs GPUs, and was never run with the router's state"),
    Refusal("init_model_with_meta_device", "experts and the router's state would stay uninitialized"),
)

OR_NO_CHUNKS = "Leave it out, or add --moe-relu-activation-limit 0"
ONE_DISPATCH = "a layer that works in chunks has no single dispatch to overlap with"
# PyTorch's checkpoint recomputes a chunk without fp8_autocast. Transformer Engine's checkpoint recomputes it with
# fp8_autocast, but keeps the scales of delayed scaling in forward order, while chunks run backward from the last.
QUANTIZED = "chunks of a layer are computed again outside of the quantized part"
NOT_IN_CHUNKS = (
    Refusal("moe_shared_expert_overlap", ONE_DISPATCH, OR_NO_CHUNKS),
    Refusal("overlap_moe_expert_parallel_comm", ONE_DISPATCH, OR_NO_CHUNKS),
    Refusal("overlap_dispatch_backward_with_experts_wgrad", ONE_DISPATCH, OR_NO_CHUNKS),
    Refusal("fp8", QUANTIZED, OR_NO_CHUNKS),
    Refusal("fp4", QUANTIZED, OR_NO_CHUNKS),
    Refusal(
        "offload_modules",
        "--fine-grained-activation-offloading would keep activations that a chunk computes again",
        OR_NO_CHUNKS,
        lambda value: not {"expert_fc1", "moe_act", "fused_group_mlp"}.isdisjoint(value),
    ),
)

RELU_VARIANTS = ("deco",)  # values of --moe-baseline-router for --moe-relu-routing
NOT_WITH_HASH = (
    Refusal("mtp_num_layers", "its layers embed different ids, which would overwrite those of all routers"),
    Refusal("pipeline_model_parallel_size", "only the first and last stage have the ids", refused=lambda n: n > 1),
    Refusal("overlap_moe_expert_parallel_comm", "two micro-batches take turns, and the router has the ids of one"),
    Refusal("moe_z_loss_coeff", "hash routing has no logits"),
    Refusal("moe_input_jitter_eps", "hash routing does not read hidden states"),
)


def routing_problems(settings: Settings) -> list[str]:
    """Return a message for each setting that cannot be used with ReLU routing, a warm-up or a baseline router.

    Args:
        settings: Megatron's parsed arguments or a `ReMoEConfig`, read by attribute name.

    Returns:
        Messages with the flag, its value, the remedy and the error code. Empty if there is no problem.
    """
    by_code = {
        "REMOE-E205": _values(settings) if settings.moe_relu_routing else (),
        "REMOE-E204": _refused(settings, "relu", "--moe-relu-routing") if settings.moe_relu_routing else (),
        "REMOE-E206": _warmup(settings),
        "REMOE-E207": _baseline(settings),
    }
    return [f"{problem} [{code}]" for code, problems in by_code.items() for problem in problems]


def _refused(settings: Settings, router: str, given: str) -> Iterator[str]:
    """Yield a message for each of Megatron's settings that cannot be used with a router.

    Args:
        settings: as in `routing_problems`.
        router: "relu", "warmup" or a value of --moe-baseline-router.
        given: the flag that asks for the router.
    """
    refusals = [*REFUSALS]
    if router == "warmup":  # it routes by top-k
        refusals = [refusal for refusal in REFUSALS if refusal.reason != IGNORED]
    elif router == "normalized_top_k":
        refusals = [refusal for refusal in REFUSALS if refusal.name != "moe_aux_loss_coeff"]
    elif router == "hash":
        refusals += NOT_WITH_HASH
    problems = [refusal.problem(settings, given) for refusal in refusals]
    if settings.moe_relu_activation_limit:
        problems += [refusal.problem(settings, "--moe-relu-activation-limit") for refusal in NOT_IN_CHUNKS]
    yield from filter(None, problems)
    yield from _combinations(settings, given)


def _combinations(settings: Settings, given: str) -> Iterator[str]:
    """Yield a message for each combination of values that is refused."""
    backend = getattr(settings, "moe_flex_dispatcher_backend", None)
    if getattr(settings, "moe_token_dispatcher_type", None) == "flex" and backend != "hybridep":
        yield (  # token_dispatcher.py: _DeepepManager and _NCCLEPManager.setup_metadata
            f"--moe-token-dispatcher-type flex with its backend {backend} cannot be used with {given}: it sends k "
            "pairs per token. Use --moe-flex-dispatcher-backend hybridep, or --moe-token-dispatcher-type alltoall."
        )
    is_hybrid = getattr(settings, "hybrid_layer_pattern", None) or getattr(settings, "is_hybrid_model", False)
    graphs = getattr(settings, "cuda_graph_impl", None)
    modules = as_list(getattr(settings, "cuda_graph_modules", None) or "full")  # by default, whole layers are captured
    has_moe = any(str(getattr(module, "name", module)).startswith(("moe", "full")) for module in modules)
    # GPTModel's layers hold attention and experts, and attn captures all of it: create_mcore_cudagraph_manager.
    captures_experts = has_moe or (graphs == "local" and not is_hybrid)
    if graphs == "full_iteration" or (graphs in ("local", "transformer_engine") and captures_experts):
        yield (
            f"--cuda-graph-impl {graphs} with --cuda-graph-modules {shown(modules)} cannot be used with {given}: the "
            "number of routed pairs changes from step to step. Use --cuda-graph-impl none, or local with "
            "--cuda-graph-modules attn and a --hybrid-layer-pattern."
        )


def _values(settings: Settings) -> Iterator[str]:
    """Yield a message for each setting of ReLU routing that is out of range."""
    experts, topk, most = _experts(settings), settings.moe_router_topk, settings.moe_relu_max_experts
    init, multiplier = settings.moe_relu_l1_reg_coeff_init, settings.moe_relu_l1_reg_coeff_multiplier
    floor, limit = settings.moe_relu_layer_floor, settings.moe_relu_activation_limit
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
    if most is not None and experts and not topk <= most <= experts:
        yield (
            f"--moe-relu-max-experts {most} must be at least --moe-router-topk {topk} and at most "
            f"--num-experts {experts}."
        )
    if limit and not 1.0 <= limit < float("inf"):
        yield f"--moe-relu-activation-limit {limit} must be at least 1 (default 2), or 0 for no limit."


def _warmup(settings: Settings) -> Iterator[str]:
    """Yield a message for each setting that cannot be used with a near-dense warm-up, in which k changes."""
    topk, steps, experts = settings.moe_warmup_topk, settings.moe_warmup_steps, _experts(settings)
    if topk is None and not steps:
        return
    if topk is None or steps < 1:
        yield "--moe-warmup-topk and --moe-warmup-steps belong together: give both, for instance 6 (of 8) and 100."
    elif not settings.moe_router_topk < topk <= experts:
        yield (
            f"--moe-warmup-topk {topk} must be above --moe-router-topk {settings.moe_router_topk} and at most "
            f"--num-experts {experts}."
        )
    if settings.moe_relu_routing:
        yield "--moe-warmup-topk cannot be used with --moe-relu-routing, which is dense at first anyway. Leave it out."
    else:
        yield from _refused(settings, "warmup", "--moe-warmup-topk")


def _baseline(settings: Settings) -> Iterator[str]:
    """Yield a message for each setting that cannot be used with the baseline router."""
    if settings.moe_baseline_router is None:
        return
    given = f"--moe-baseline-router {settings.moe_baseline_router}"
    if not _experts(settings):
        yield f"{given} needs experts to route to: give --num-experts (for instance 8)."
    changes_relu = settings.moe_baseline_router in RELU_VARIANTS
    if changes_relu and not settings.moe_relu_routing:
        yield f"{given} changes the gates of ReLU routing: add --moe-relu-routing."
    if changes_relu and settings.moe_relu_normalize:
        yield f"--moe-relu-normalize cannot be used with {given}: both scale the gates. Leave it out."
    if changes_relu and not settings.moe_relu_l1_reg_load_balancing:
        yield f"--no-moe-relu-l1-reg-load-balancing cannot be used with {given}: it does not balance. Leave it out."
    if (settings.moe_relu_routing and not changes_relu) or settings.moe_warmup_topk is not None:
        other = "--moe-relu-routing" if settings.moe_relu_routing else "--moe-warmup-topk"
        yield f"{other} cannot be used with {given}: each replaces the router. Give only one of them."
    if not changes_relu:  # --moe-relu-routing already refuses the same settings
        yield from _refused(settings, settings.moe_baseline_router, given)


def _experts(settings: Settings) -> int:
    """Return the number of experts, 0 for dense models. Megatron's arguments and configuration name it differently."""
    return getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None) or 0
