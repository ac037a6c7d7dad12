"""Test the memory estimate: activations, recomputation, phases, and exchanged bytes."""

import argparse

import pytest

from tools.plan import memory
from tools.plan.parameters import Stage
from tools.plan.phases import experts_by_phase
from tools.recipes.megatron_values import make_parser


def arguments(**changes: object) -> argparse.Namespace:
    """Return the arguments that activations depend on, for a small layer in fp32."""
    flags = """--transformer-impl local
        --hidden-size 64 --ffn-hidden-size 96 --moe-ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2
        --kv-channels 16 --micro-batch-size 3 --seq-length 32 --num-experts 4 --moe-router-topk 1 --swiglu
        --moe-relu-routing --moe-relu-activation-limit 0 --group-query-attention --position-embedding-type rope
        --moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1"""
    validated = {"virtual_pipeline_model_parallel_size": None, "use_layer_wise_distributed_optimizer": False}
    return argparse.Namespace(**vars(make_parser().parse_args(flags.split())) | validated | changes)


def test_activations_beyond_the_limit_are_not_kept() -> None:
    args = arguments(moe_relu_activation_limit=1.0)
    layer, at_target = memory.layer_activations(args, "*E", 2.0), memory.layer_activations(args, "*E", 1.0)
    assert layer.kept + layer.recomputed == at_target.kept and layer.recomputed > 0 == at_target.recomputed
    args.moe_relu_routing = False  # the near-dense warm-up of top-k is limited too
    assert memory.layer_activations(args, "*E", 2.0) == layer


@pytest.mark.parametrize(("granularity", "how", "kept"), [
    ("selective", ["moe"], {"residual", "norms", "attention"}),
    ("selective", None, None),  # Megatron's default drops scores, which fused layers do not have
    ("full", "uniform", set()),
    ("full", "block", None),
])  # fmt: skip
def test_recomputation(granularity: str, how: list[str] | str | None, kept: set[str] | None) -> None:
    """A layer that is recomputed in full keeps its input: 96 vectors of 64 numbers in fp32."""
    parts = memory.layer_parts(arguments(), "*E", 2)
    flag = "recompute_modules" if granularity == "selective" else "recompute_method"
    layer = memory.layer_activations(arguments(**{"recompute_granularity": granularity, flag: how}), "*E", 2)
    assert layer.kept == (sum(parts[name] for name in (parts if kept is None else kept)) or 4 * 64 * 96)
    assert layer.kept + layer.recomputed == sum(parts.values())


@pytest.mark.parametrize(("changes", "phases"), [
    ({}, {"dense": 16, "way": 1.8, "steady": 1}),
    ({"moe_relu_max_experts": 4}, {"dense": 4, "way": 1.8, "steady": 1}),
    ({"moe_relu_max_experts": 2}, {"dense": 2, "steady": 1}),
    ({"moe_relu_activation_limit": 0.0}, {"dense": 16, "steady": 1}),
    ({"moe_router_topk": 24}, {"dense": 24, "steady": 24}),
    ({"moe_relu_routing": False}, {"steady": 1}),
    ({"moe_relu_routing": False, "moe_warmup_topk": 24}, {"dense": 24, "steady": 1}),
    ({"num_experts": None}, {"steady": 0}),
])  # fmt: skip
def test_experts_by_phase(changes: dict[str, object], phases: dict[str, float]) -> None:
    given = {"num_experts": 32, "moe_relu_activation_limit": 2.0, "moe_relu_max_experts": None} | changes
    assert experts_by_phase(arguments(**given)) == phases


@pytest.mark.parametrize(("experts", "times", "recomputed"), [(16, 6, None), (2, 4, None), (2, 6, "full")])
def test_exchanged_bytes(experts: int, times: int, recomputed: str | None) -> None:
    """Vectors of 64 numbers go to 7 of 8 GPUs. Layers above the activation limit or recomputed resend them."""
    settings = {"num_experts": 32, "moe_relu_activation_limit": 2.0, "expert_model_parallel_size": 8}
    stages = [Stage(shared=0, experts=0, layers=("*-", "*E")), Stage(shared=0, experts=0, layers=("E",))]
    args = arguments(**settings, global_batch_size=64, world_size=8, recompute_granularity=recomputed)
    tokens = 64 * 32 / 8
    assert memory.exchanged_bytes(args, stages, experts) == times * 2 * tokens * experts * 7 / 8 * 64 * 4
    args.moe_token_dispatcher_type = "allgather"
    assert memory.exchanged_bytes(args, stages, experts) == times * 2 * tokens * 7 * 64 * 4


@pytest.mark.parametrize(
    ("chunks", "micro_batches", "expected"),
    [(None, 8, [4, 3, 2, 1]), (None, 2, [2, 2, 2, 1]), (3, 8, [5, 13 / 3, 11 / 3, 3]), (3, 4, [4, 4, 11 / 3, 3])],
)
def test_micro_batches_in_flight(chunks: int | None, micro_batches: int, expected: list[float], monkeypatch) -> None:
    """In Megatron's schedule, a stage holds the warm-up's chunks and one more, at most all chunks of a step."""
    monkeypatch.setattr(memory, "get_num_microbatches", lambda: micro_batches)
    args = arguments(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=chunks)
    assert [memory._micro_batches_in_flight(args, stage) for stage in range(4)] == pytest.approx(expected)
