"""Test which settings are refused, and that docs/refusals.md lists them."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.remoe.routing.refusals import NOT_IN_CHUNKS, REFUSALS, Refusal, flag_name, routing_problems
from megatron.training.arguments import add_megatron_arguments
from tests.layers import make_config, make_layer
from tests.training_runs import REPOSITORY


def test_flags_are_megatrons() -> None:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest: action.option_strings for action in parser._actions}
    assert all(flag_name(entry.name) in known.get(entry.name, [entry.name]) for entry in REFUSALS)


SETTINGS = {  # settings of which only some values are refused
    "moe_aux_loss_coeff": "`--moe-aux-loss-coeff` (but ignored with `--moe-router-load-balancing-type` `aux_loss`, "
    "`seq_aux_loss`, `sinkhorn` or `none`)",
    "moe_router_load_balancing_type": "`--moe-router-load-balancing-type` other than these four",
    "moe_router_score_function": "`--moe-router-score-function` other than `softmax`",
}


def test_the_page_has_every_refusal() -> None:
    settings = {entry.name: SETTINGS.get(entry.name, f"`{flag_name(entry.name)}`") for entry in REFUSALS}
    rows = [f"| {settings[entry.name]} | {entry.reason} |" for entry in REFUSALS]
    table = "\n".join(["|---|---|", *rows, ""])
    assert f"{table}\n" in (REPOSITORY / "docs" / "refusals.md").read_text()


REFUSED_TOGETHER: dict[str, tuple[dict[str, Any], str]] = {
    "DeepEP": ({"moe_token_dispatcher_type": "flex"}, "flex with its backend deepep cannot be used"),
    "HybridEP with a budget": (
        {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": "hybridep",
            "moe_expert_rank_capacity_factor": 1.5,
        },
        "--moe-expert-rank-capacity-factor 1.5 cannot be used",
    ),
    "FP8 in chunks": ({"fp8": "hybrid"}, "--fp8-format hybrid .* add --moe-relu-activation-limit 0"),
    "a graph of the whole step": (
        {"cuda_graph_impl": "full_iteration"},
        "full_iteration with --cuda-graph-modules full",
    ),
    "a graph of the whole step, without ReLU": (
        {"cuda_graph_impl": "full_iteration", "moe_relu_routing": False, "moe_baseline_router": "top_p"},
        "full_iteration .* --moe-baseline-router top_p",
    ),
    "graphs of layers": ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local with --cuda-graph-modules full cannot"),
    "graphs of GPTModel's attention": (
        {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]},
        "--cuda-graph-modules attn cannot be used",
    ),
    "a graph of the router": (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe_router"]},
        "modules moe_router cannot",
    ),
}


@pytest.mark.parametrize("name", REFUSED_TOGETHER)
def test_refused_together(name: str) -> None:
    settings, message = REFUSED_TOGETHER[name]
    with pytest.raises(ValueError, match=message):
        make_config(**settings)


@pytest.mark.usefixtures("process_groups")
def test_attention_of_a_hybrid_model_can_be_captured() -> None:
    """The MoE layer is still recomputed, although Megatron would recompute it only in graphs of MoE modules."""
    settings = {"recompute_granularity": "selective", "recompute_modules": ["moe"], "is_hybrid_model": True}
    config = make_config(cuda_graph_impl="local", cuda_graph_modules=["attn"], **settings)
    assert config.cuda_graph_impl == "local" and make_layer(config).moe_layer_recompute


@pytest.mark.parametrize("refusal", [*REFUSALS, *NOT_IN_CHUNKS], ids=lambda refusal: refusal.name)
def test_each_setting_is_refused(refusal: Refusal) -> None:
    given = {refusal.name: {"offload_modules": ["moe_act"], "mlp_chunks_for_training": 2}.get(refusal.name, True)}
    [problem] = routing_problems(SimpleNamespace(**vars(make_config(moe_relu_activation_limit=2.0)) | given))
    assert problem.startswith(f"{flag_name(refusal.name)} ") and problem.endswith("[REMOE-E204]")


@pytest.mark.parametrize("router", ["--moe-relu-routing", "--moe-baseline-router top_p"])
def test_megatron_fsdp_is_refused(router: str) -> None:
    is_relu = router == "--moe-relu-routing"
    config = make_config(moe_relu_routing=is_relu, moe_baseline_router=None if is_relu else "top_p")
    [problem] = routing_problems(SimpleNamespace(**vars(config) | {"use_megatron_fsdp": True}))
    assert problem.startswith(f"--use-megatron-fsdp (on) cannot be used with {router}: ")
