"""The settings of Megatron that ReLU routing, a warm-up and baseline routers refuse, as one table.

Most assume exactly k experts per token, drop or add token-expert pairs, or would be ignored silently. The attribute
names are those of Megatron's parsed arguments, which its `TransformerConfig` shares, so the table serves the
command line and the library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Settings = Any  # argparse.Namespace or TransformerConfig: both are read by attribute name


@dataclass(frozen=True)
class Refusal:
    """One refused setting.

    Attributes:
        name: attribute that holds the setting; the flag is derived from it.
        reason: what would go wrong.
        where: file and function of megatron-core 0.19.2 that show it.
        remedy: what to do instead.
        refused: whether a value of the attribute, other than None, is refused.
    """

    name: str
    reason: str
    where: str
    remedy: str = "Leave it out"
    refused: Callable[[Any], bool] = bool

    def problem(self, settings: Settings, given: str) -> str | None:
        """Return the message for `settings` with the flag `given`; None where nothing is refused."""
        value = getattr(settings, self.name, None)
        if value is None or not self.refused(value):
            return None
        return f"{flag(self.name)} {shown(value)} cannot be used with {given}: {self.reason}. {self.remedy}."


WITHOUT_FLAG = "moe_router_topk_limited_devices"
SPELLED = {"fp8": "--fp8-format", "fp4": "--fp4-format", WITHOUT_FLAG: WITHOUT_FLAG}


def flag(name: str) -> str:
    """Return Megatron's spelling of an attribute on the command line, or the name of a field without a flag."""
    return SPELLED.get(name, "--" + name.replace("_", "-"))


def shown(value: Any) -> str:
    """Return a value as a user would type it, and (on) for a switch."""
    if value is True:
        return "(on)"
    if isinstance(value, list | tuple):
        return " ".join(shown(item) for item in value)
    return str(getattr(value, "name", value))


def _given(_value: Any) -> bool:
    return True


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


ADDS_PAIRS = "it adds token-expert pairs that were not routed"
BALANCED = "The L1 term balances the load: leave it out"
DROPLESS = "Leave it out: ReMoE is dropless"
DROPS = "it drops or pads tokens"
IGNORED = "it acts on top-k only"
OTHER_CLASS = "Megatron replaces the configuration class for it"
TOPK_SPEC = "its router and dispatcher compute top-k"
UNTESTED_STATE = "it needs GPUs, and was never run with the router's state"

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
    Refusal("moe_expert_capacity_factor", DROPS, f"{MOE_UTILS}: apply_router_token_dropping", DROPLESS, _given),
    Refusal(
        "moe_pad_expert_input_to_capacity", DROPS, f"{DISPATCHERS}: MoEAlltoAllTokenDispatcher.preprocess", DROPLESS
    ),
    Refusal(
        "moe_pad_experts_for_cuda_graph_inference",
        DROPS,
        "core/inference/utils.py: set_decode_expert_padding",
        DROPLESS,
    ),
    Refusal(
        "moe_expert_rank_capacity_factor", DROPS, f"{DISPATCHERS}: _HybridEPManager.setup_metadata", DROPLESS, _given
    ),
    Refusal("moe_paged_stash", "its buffers are sized for k experts per token", f"{EXPERTS}._fused_forward"),
    Refusal(
        "moe_permute_fusion",
        "Transformer Engine's permutation fails if a layer routes no token",
        f"{MOE_UTILS}: permute",
        "Leave it out: tokens are not sorted, so there is nothing to fuse",
    ),
    Refusal(
        "moe_enable_routing_replay",
        "replay records k experts per token",
        f"{MOE_UTILS}: topk_routing_with_score_function",
    ),
    Refusal(
        "moe_routing_trace_path",
        "it records exactly k experts per token",
        "core/transformer/moe/router_trace.py: RouterTracer._record",
        refused=_given,
    ),
    Refusal(
        "moe_apply_probs_on_input",
        "it assumes one expert per token",
        f"{EXPERTS}.forward",
        "Leave it out: the gate scales the expert's output",
    ),
    Refusal("moe_router_padding_for_quantization", ADDS_PAIRS, f"{MOE_UTILS}: pad_routing_map"),
    Refusal("moe_aux_loss_coeff", IGNORED, ROUTING, BALANCED, lambda value: any(as_list(value))),
    Refusal("moe_router_enable_expert_bias", IGNORED, ROUTING, BALANCED),
    Refusal(
        "moe_router_load_balancing_type",
        IGNORED,
        ROUTING,
        "The L1 term balances the load: use --moe-router-load-balancing-type none or leave it out",
        lambda value: not set(as_list(value)) <= {"none", "aux_loss"},
    ),
    Refusal(
        "moe_router_score_function",
        IGNORED,
        ROUTING,
        "Leave it out: the score is ReLU",
        lambda value: value != "softmax",
    ),
    Refusal("moe_router_topk_scaling_factor", IGNORED, ROUTING, refused=_given),
    Refusal("moe_router_num_groups", IGNORED, ROUTING, refused=_given),
    Refusal("moe_router_group_topk", IGNORED, ROUTING, refused=_given),
    Refusal(WITHOUT_FLAG, IGNORED, CONFIG, refused=_given),
    Refusal("moe_router_fusion", "the fused kernel computes top-k", ROUTING),
    Refusal(
        "moe_router_force_biased",
        "its random bias changes the number of experts",
        f"{MOE_UTILS}: apply_biased_logits",
        refused=_given,
    ),
    Refusal(
        "moe_router_force_load_balancing",
        "random logits do not activate k experts",
        f"{MOE_UTILS}: apply_random_logits",
    ),
    Refusal(
        "moe_use_upcycling",
        "it scales the experts for a softmax",
        "core/transformer/moe/upcycling_utils.py: _convert_to_moe_state_dict",
        "Use remoe convert, which fits the gates",
    ),
    Refusal(
        "moe_latent_size",
        "planned dispatch would skip the latent projections",
        "core/transformer/moe/moe_layer.py: MoELayer.preprocess",
        refused=_given,
    ),
    Refusal(
        "transformer_impl",
        TOPK_SPEC,
        INFERENCE_SPEC,
        "Use --transformer-impl transformer_engine or local",
        lambda value: value == "inference_optimized",
    ),
    Refusal("heterogeneous_layers_config_path", OTHER_CLASS, SETTINGS, refused=_given),
    Refusal("heterogeneous_layers_config_encoded_json", OTHER_CLASS, SETTINGS, refused=_given),
    Refusal("use_torch_fsdp2", UNTESTED_STATE, f"{WRAPPING}: _ddp_wrap"),
    Refusal(
        "init_model_with_meta_device",
        "experts and the router's state would stay uninitialized",
        f"{WRAPPING}: to_empty_if_meta_device",
    ),
)
