"""Test the memory estimate: activations against PyTorch's, phases, exchanged bytes, and the optimizer."""

import argparse

import pytest
import torch

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.remoe.layer import specs
from megatron.remoe.routing.config import ReMoEConfig
from tests.layers import make_config
from tools.plan import memory
from tools.plan.parameters import Stage
from tools.plan.step_time import experts_by_phase
from tools.recipes.megatron_values import make_parser

ROTARY: dict[str, object] = {"position_embedding_type": "rope", "micro_batch_size": 12}


def arguments(**changes: object) -> argparse.Namespace:
    """Return the arguments that activations depend on, for a layer in fp32 on plain PyTorch."""
    flags = """--transformer-impl local --no-local-layer-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion
        --hidden-size 64 --ffn-hidden-size 96 --moe-ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2
        --kv-channels 16 --micro-batch-size 3 --seq-length 32 --num-experts 4 --moe-router-topk 1 --swiglu
        --moe-relu-routing --moe-relu-activation-limit 0 --group-query-attention --position-embedding-type none
        --moe-token-dispatcher-type alltoall --expert-tensor-parallel-size 1"""
    validated = {"virtual_pipeline_model_parallel_size": None, "use_layer_wise_distributed_optimizer": False}
    return argparse.Namespace(**vars(make_parser().parse_args(flags.split())) | validated | changes)


SIZES = """hidden_size ffn_hidden_size moe_ffn_hidden_size num_attention_heads qk_layernorm
    moe_token_dispatcher_type moe_relu_activation_limit moe_shared_expert_intermediate_size moe_shared_expert_gate"""


def kept_by_pytorch(args: argparse.Namespace) -> tuple[float, float]:
    """Return the bytes that a real ReMoE layer keeps for backward, and its active experts per token."""
    settings = {name: getattr(args, name) for name in SIZES.split()}
    settings |= {"normalization": "LayerNorm", "masked_softmax_fusion": False}  # LayerNorm keeps only its input
    settings |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "moe_router_dtype": None}
    settings |= {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    settings["num_query_groups"] = args.num_query_groups if args.group_query_attention else None
    config = make_config(ReMoEConfig, **settings)
    spec = get_gpt_layer_local_spec(args.num_experts, False, args.qk_layernorm)
    spec = specs.with_router(spec)
    spec = specs.with_fused_layers(spec) if args.local_layer_fusion else spec
    layer = spec.module(config, submodules=spec.submodules, layer_number=1).cuda()
    tokens = torch.randn(args.seq_length, args.micro_batch_size, args.hidden_size, requires_grad=True)
    angles = RotaryEmbedding(args.kv_channels, 1.0)(args.seq_length) if args.position_embedding_type == "rope" else None
    future = None if args.local_layer_fusion else torch.ones(1, 1, args.seq_length, args.seq_length).triu(1).bool()
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        output = layer(tokens.to(next(layer.parameters()).device), attention_mask=future, rotary_pos_emb=angles)
    assert output is not None
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    total = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)
    return total, float(layer.mlp.router.counts.active) / (args.seq_length * args.micro_batch_size)


plain_layers = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's fused kernels keep less than plain ones")
LAYERS: dict[str, dict[str, object]] = {
    "Megatron's": {"local_layer_fusion": False},
    "fused": {},
    "all heads": {"group_query_attention": False, "num_query_groups": 1},
    "all heads, rotary": {"group_query_attention": False, "num_query_groups": 1} | ROTARY,
    "rotary": ROTARY,
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "norms of heads": {"qk_layernorm": True},
    "gated shared expert": {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True},
}


@plain_layers
@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("name", LAYERS)
def test_activations_are_those_that_pytorch_keeps(name: str) -> None:
    changes = {"local_layer_fusion": True} | LAYERS[name]
    args = arguments(**changes)
    real, per_token = kept_by_pytorch(args)
    assert memory.layer_activations(args, "*E", per_token).kept == pytest.approx(real, rel=0.04)


@plain_layers
@pytest.mark.usefixtures("process_groups")
def test_activations_beyond_the_limit_are_not_kept() -> None:
    args = arguments(local_layer_fusion=True, moe_relu_activation_limit=1.0)
    real, per_token = kept_by_pytorch(args)
    assert per_token > 1.5
    layer = memory.layer_activations(args, "*E", per_token)
    assert layer.kept == pytest.approx(real, rel=0.03)
    at_target = memory.layer_activations(args, "*E", 1.0)
    assert layer.kept + layer.recomputed == at_target.kept and at_target.recomputed == 0
    args.moe_relu_routing = False  # the near-dense warm-up of top-k is limited too
    assert memory.layer_activations(args, "*E", per_token) == layer


def test_selective_recomputation() -> None:
    parts = memory.layer_parts(arguments(), "*E", 2)
    kept_with_moe = sum(parts[name] for name in ("residual", "norms", "attention", "attention output", "scores"))
    for modules, kept, again in (
        (["moe"], kept_with_moe, "E"),
        (["mlp"], sum(parts.values()), ""),
        (None, sum(parts.values()) - parts["scores"], ""),  # Megatron's default
    ):
        args = arguments(recompute_granularity="selective", recompute_modules=modules)
        assert memory.layer_activations(args, "*E", 2) == (kept, sum(parts.values()) - kept, again)


@pytest.mark.parametrize(
    ("method", "layers", "chunks", "sizes"),
    [("uniform", 3, None, [3, 1]), ("uniform", 3, 2, [2, 2]), ("block", 1, 2, [1, 0, 1, 0])],
)
def test_full_recomputation(method: str, layers: int, chunks: int | None, sizes: list[int]) -> None:
    """A group of recomputed layers keeps its input only. Size 0 is a layer that keeps everything."""
    args = arguments(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)
    args.virtual_pipeline_model_parallel_size = chunks
    whole, inputs = sum(memory.layer_parts(args, "*E", 2).values()), 64 * 32 * 3 * 4
    expected = [(inputs, size * whole - inputs, "*E" * size) if size else (whole, 0, "") for size in sizes]
    assert [*memory.group_activations(args, ["*E"] * 4, 2)] == expected


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


@pytest.mark.parametrize(("experts", "times", "full"), [(16, 6, 0), (2, 4, 0), (2, 5, 1)])
def test_exchanged_bytes(experts: int, times: int, full: int) -> None:
    """Vectors of 64 numbers go to 7 of 8 GPUs. Layers above the activation limit or recomputed in full resend them."""
    settings = {"num_experts": 32, "moe_relu_activation_limit": 2.0, "expert_model_parallel_size": 8}
    stages = [Stage(shared=0, experts=0, layers=("*-", "*E")), Stage(shared=0, experts=0, layers=("E",))]
    args = arguments(**settings, global_batch_size=64, world_size=8)
    if full:
        vars(args).update(recompute_granularity="full", recompute_method="block", recompute_num_layers=full)
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
    args.microbatch_group_size_per_vp_stage, args.overlap_moe_expert_parallel_comm = None, False
    assert [memory._micro_batches_in_flight(args, stage) for stage in range(4)] == pytest.approx(expected)


def test_optimizer_bytes() -> None:
    """The distributed optimizer splits its state: shared weights over 4 GPUs, experts over 2."""
    common = {"accumulate_allreduce_grads_in_fp32": True, "world_size": 4, "expert_model_parallel_size": 2}
    common |= {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None}
    common |= {"padded_vocab_size": 128, "cross_entropy_loss_fusion": False}
    stages = [Stage(shared=1000, experts=400, layers=("*E", "*E"))]
    for bf16, is_split, expected in ((True, False, 12 * 1400), (True, True, 12 * 450), (False, False, 8 * 1400)):
        given = arguments(bf16=bf16, use_distributed_optimizer=is_split, **common)
        counted = memory.stage_memory(given, stages, 0, 1)
        assert (counted.weights, counted.gradients, counted.optimizer) == ((4 - 2 * bf16) * 1400, 4 * 1400, expected)
