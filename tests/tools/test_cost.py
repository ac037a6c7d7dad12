"""The cost of a training before it starts: the paper's figures, layouts, memory against what PyTorch really keeps."""

import argparse

import pytest
import torch

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.remoe.local.hybrid import local_hybrid_stack_spec
from megatron.remoe.moe.specs import (
    with_fused_layers,
    with_latent_attention,
    with_norms_of_all_heads,
    with_relu_routing,
)
from megatron.remoe.routing.config import ReMoEConfig, ReMoEMLAConfig
from tests.entry import shared_entry
from tests.layers import make_config
from tests.trainings import REPOSITORY
from tools.cost import activations, estimate, memory
from tools.cost.parameters import Stage

MODEL = """
--num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 3072 --group-query-attention
--num-query-groups 4 --seq-length 1024 --max-position-embeddings 1024 --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --make-vocab-size-divisible-by 1024 --micro-batch-size 1 --global-batch-size 512
--train-iters 100 --lr 5e-4 --bf16 --tokenizer-type NullTokenizer --vocab-size 50257
""".split()
EXPERTS = "--num-experts 8 --moe-router-topk 1 --moe-ffn-hidden-size 3072 --moe-token-dispatcher-type alltoall".split()
LATENT: dict[str, object] = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_head_dim": 12, "qk_pos_emb_head_dim": 6}
LATENT |= {"v_head_dim": 10, "qk_layernorm": True, "rope_type": "rope"}
TENSOR_PARALLEL = ["--sequence-parallel", "--tensor-model-parallel-size"]


def cost(*arguments: str, code: int = 0) -> str:
    """What it prints, errors included, in a Megatron that is imported already."""
    program = REPOSITORY / "tools" / "cost" / "__main__.py"
    found, output = shared_entry().run(arguments, script=program, limit=120)
    assert found == code and "Traceback" not in output, output
    return output


def figures(output: str, label: str) -> list[float]:
    """The numbers of the line that begins with the label."""
    line = next(line for line in output.splitlines() if line.strip().startswith(label))
    return [float(word.replace(",", "")) for word in line.split() if word.replace(",", "").replace(".", "").isdigit()]


def test_layout_is_megatrons() -> None:
    """By hand: four stages of three layers, tensor parallel 2 splits attention, expert parallel 4 the experts."""
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4"
    layout += " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --use-distributed-optimizer"
    output = cost("--gpus", "32", "--", *MODEL, *EXPERTS, "--moe-relu-routing", *layout.split())
    hidden, ffn, vocabulary = 768, 3072, 51200
    attention = (2 * hidden * hidden + 2 * hidden * 256) // 2
    shared = (
        3 * (attention + 8 * hidden + 2 * hidden) + vocabulary * hidden // 2 + hidden
    )  # the last stage: output, norm
    experts = 3 * 2 * 3 * hidden * ffn
    gib = 2**30
    assert figures(output, "weights")[0] == pytest.approx(2 * (shared + experts) / gib, abs=0.006)
    assert figures(output, "gradients")[0] == pytest.approx(4 * (shared + experts) / gib, abs=0.006)
    # 8 GPUs a stage: 4 copies of what is shared, 2 of each expert.
    assert figures(output, "optimizer")[0] == pytest.approx(12 * (shared / 4 + experts / 2) / gib, abs=0.006)
    dense, on_the_way, steady = figures(output, "activations")
    assert on_the_way > max(dense, steady), "before it the layers work in chunks that are computed again"
    assert "in the fullest of 4 pipeline stages" in output


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        ("8", [*TENSOR_PARALLEL, "5"], "is not divisible by total_model_size"),
        ("8", [*TENSOR_PARALLEL, "8"], "num_attention_heads (12) must be a multiple"),
        ("4", ["--expert-model-parallel-size", "8"], "--expert-model-parallel-size 8: 4 GPUs are not divisible"),
        ("8", ["--num-experts", "1" + 20 * "0"], f"--num-experts: 1{20 * '0'} of a layer are too many"),
        ("8", ["--expert-model-parallel-size", "3"], "Number of experts should be a multiple of expert model"),
        ("8", ["--micro-batch-size", "3"], "must be divisible by"),
        ("8", ["--pipeline-model-parallel-size", "8"], "layers should be divisible by the pipeline"),
        ("8", ["--moe-expert-capacity-factor", "1.0"], "cannot be used with --moe-relu-routing"),
    ],
)
def test_layouts_that_cannot_work(gpus: str, flags: list[str], message: str) -> None:
    output = cost("--gpus", gpus, "--", *MODEL, *EXPERTS, "--moe-relu-routing", *flags, code=2)
    assert message in output and output.count("\n") <= 4


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--gpus", "0"], "--gpus: '0'"),
        (["--gpus", "1", "--utilization", "40"], "--utilization 40.0"),
        (["--gpus", "1", "--gpu", "tpu"], "--gpu tpu"),
        (["--gpus", "1", "--paper", "7b", "dense"], "--paper 7b dense"),
        ([], "--gpus"),
    ],
)
def test_own_flags_that_are_wrong(own: list[str], message: str) -> None:
    assert message in cost(*own, "--", *MODEL, code=2)


@pytest.mark.parametrize(("flag", "length"), [("--train-iters", "100"), ("--train-samples", "51200")])
def test_number_of_checkpoints(flag: str, length: str) -> None:
    words = [word for word in MODEL if word not in ("--train-iters", "100")] + [flag, length]
    output = cost("--gpus", "1", "--", *words, "--save", "/nowhere", "--save-interval", "40")
    assert figures(output, "Checkpoints")[0] == 3


def test_an_unlisted_gpu_and_what_does_not_fit() -> None:
    own = "--gpus 1 --gpu mine --tflops 100 --memory 1 --utilization 0.5".split()
    output = cost(*own, "--", *MODEL, *EXPERTS, "--moe-relu-routing")
    assert "Plan: 1 x mine (1 GiB, 100 TFLOP/s dense bf16)" in output
    assert "GiB are more than a mine has" in output
    flops = 100 * 512 * figures(output, "996")[0] * 1e9
    assert figures(output, "time")[0] == pytest.approx(flops / (100e12 * 0.5) / 60, abs=0.1)


def arguments(**changes: object) -> argparse.Namespace:
    """What the activations depend on, of a layer in fp32 on plain PyTorch."""
    off = """bf16 fp16 moe_permute_fusion moe_pad_expert_input_to_capacity sequence_parallel bias_swiglu_fusion
        bias_gelu_fusion local_layer_fusion distribute_saved_activations multi_latent_attention qk_layernorm
        qk_layernorm_all_heads moe_shared_expert_gate use_megatron_fsdp"""
    none = """hybrid_layer_pattern moe_shared_expert_intermediate_size recompute_granularity recompute_modules
        recompute_method recompute_num_layers cuda_graph_impl mtp_num_layers"""
    one = """tensor_model_parallel_size context_parallel_size expert_tensor_parallel_size expert_model_parallel_size
        moe_router_topk num_distributed_optimizer_instances"""
    settings: dict[str, object] = dict.fromkeys(off.split(), False) | dict.fromkeys(none.split())
    settings |= dict.fromkeys(one.split(), 1) | {"moe_token_dispatcher_type": "alltoall", "transformer_impl": "local"}
    settings |= {"hidden_size": 64, "ffn_hidden_size": 96, "moe_ffn_hidden_size": 48, "num_attention_heads": 4}
    settings |= {"num_query_groups": 2, "kv_channels": 16, "micro_batch_size": 3, "seq_length": 32, "num_experts": 4}
    settings |= {"swiglu": True, "moe_relu_routing": True, "moe_relu_activation_limit": 0.0}
    return argparse.Namespace(**settings | changes)


def kept_by_pytorch(args: argparse.Namespace, sublayers: str) -> tuple[float, float]:
    """Bytes that a real layer keeps for backward, its parameters not counted, and its active experts per token."""
    experts = "E" in sublayers
    latent = {name: getattr(args, name) for name in LATENT} if args.multi_latent_attention else {}
    config = make_config(
        ReMoEMLAConfig if latent else ReMoEConfig,
        **({"qk_layernorm": args.qk_layernorm} | latent),
        normalization="LayerNorm",
        moe_shared_expert_intermediate_size=args.moe_shared_expert_intermediate_size if experts else None,
        moe_shared_expert_gate=args.moe_shared_expert_gate,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size if experts else None,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        num_moe_experts=args.num_experts if experts else None,
        moe_relu_routing=experts,
        moe_router_pre_softmax=not experts,  # which Megatron asks for with a single active expert
        moe_token_dispatcher_type=args.moe_token_dispatcher_type,
        moe_relu_activation_limit=args.moe_relu_activation_limit,
        moe_router_dtype=None,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        masked_softmax_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    if len(sublayers) == 2:
        spec = get_gpt_layer_local_spec(args.num_experts if experts else None, False, args.qk_layernorm, bool(latent))
        spec = with_latent_attention(spec) if latent else spec
        spec = with_norms_of_all_heads(spec) if args.qk_layernorm_all_heads else spec
    else:
        stack = local_hybrid_stack_spec(config, sublayers).submodules
        spec = {"*": stack.attention_layer, "-": stack.mlp_layer, "E": stack.moe_layer}[sublayers]
    # Their LayerNorm keeps nothing beside its input.
    spec = with_relu_routing(spec) if experts else spec
    spec = with_fused_layers(spec) if args.local_layer_fusion else spec
    layer = spec.module(config, submodules=spec.submodules, layer_number=1).cuda()
    tokens = torch.randn(args.seq_length, args.micro_batch_size, args.hidden_size, requires_grad=True)
    future = None if args.local_layer_fusion else torch.ones(1, 1, args.seq_length, args.seq_length).triu(1).bool()
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(tokens.to(next(layer.parameters()).device), attention_mask=future)
    assert output is not None
    pairs = float(layer.mlp.router.counts.active) if experts else 0.0
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return total, pairs / (args.seq_length * args.micro_batch_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's fused kernels keep less than the formula for plain ones")
@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize("sublayers", ["*-", "*E", "*", "-", "E"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"local_layer_fusion": True}, {"local_layer_fusion": True, "moe_token_dispatcher_type": "allgather"}],
    ids=["Megatron's", "fused", "fused, allgather"],
)
def test_activations_are_those_that_pytorch_keeps(changes: dict[str, object], sublayers: str) -> None:
    """Of layers as in GPTModel and, each attention or MLP alone, in HybridModel."""
    args = arguments(**changes)
    real, per_token = kept_by_pytorch(args, sublayers)
    assert activations.layer_activations(args, sublayers, per_token).kept == pytest.approx(real, rel=0.04)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's fused kernels keep less than the formula for plain ones")
@pytest.mark.usefixtures("process_groups")
@pytest.mark.parametrize(
    "changes",
    [
        {"qk_layernorm": True},
        {"qk_layernorm": True, "qk_layernorm_all_heads": True},
        LATENT,
        LATENT | {"q_lora_rank": 24, "v_head_dim": 18},
        {"moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True},
    ],
    ids=["norms", "norms of all heads", "latent", "latent queries", "gated shared expert"],
)
def test_activations_of_public_models(changes: dict[str, object]) -> None:
    args = arguments(local_layer_fusion=True, multi_latent_attention="kv_lora_rank" in changes, **changes)
    real, per_token = kept_by_pytorch(args, "*E")
    assert activations.layer_activations(args, "*E", per_token).kept == pytest.approx(real, rel=0.04)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's fused kernels keep less than the formula for plain ones")
@pytest.mark.usefixtures("process_groups")
def test_activations_beyond_the_limit_are_not_kept() -> None:
    args = arguments(local_layer_fusion=True, moe_relu_activation_limit=1.0)
    real, per_token = kept_by_pytorch(args, "*E")
    assert per_token > 1.5
    found = activations.layer_activations(args, "*E", per_token)
    assert found.kept == pytest.approx(real, rel=0.03)
    at_target = activations.layer_activations(args, "*E", 1.0)
    assert found.kept + found.recomputed == at_target.kept and at_target.recomputed == 0


@pytest.mark.parametrize("flag", ["moe_permute_fusion", "moe_pad_expert_input_to_capacity"])
def test_megatrons_permutation_keeps_a_copy_of_the_pairs(flag: str) -> None:
    taken = activations.layer_parts(arguments(local_layer_fusion=True), "*E", 2)
    permuted = activations.layer_parts(arguments(local_layer_fusion=True, **{flag: True}), "*E", 2)
    assert taken["expert inputs"] == 0
    assert permuted == taken | {"expert inputs": 2 * 96 * 64 * 4}


def test_recomputation() -> None:
    args = arguments()
    parts = activations.layer_parts(args, "*E", 2)
    everything = activations.layer_activations(args, "*E", 2)
    assert everything.kept == sum(parts.values()) and everything.recomputed == 0

    moe = activations.layer_activations(
        arguments(recompute_granularity="selective", recompute_modules=["moe"]), "*E", 2
    )
    assert moe.kept == sum(parts[name] for name in ("residual", "norms", "attention", "attention output", "scores"))
    assert moe.kept + moe.recomputed == everything.kept

    full = activations.layer_activations(arguments(recompute_granularity="full"), "*E", 2)
    assert full.kept == args.hidden_size * args.seq_length * args.micro_batch_size * 4


def test_a_cap_on_experts_makes_the_start_cheaper() -> None:
    """In experts that a token computes and, by hand, in vectors of 64 numbers that go to seven of eight GPUs."""
    settings = {"num_experts": 32, "moe_relu_activation_limit": 2.0, "expert_model_parallel_size": 8}
    settings |= {"global_batch_size": 64, "world_size": 8}
    stages = [Stage(shared=0, experts=0, layers=("*E", "*-")), Stage(shared=0, experts=0, layers=("E",))]
    for most, dense, recomputed in ((None, 16, True), (4, 4, True), (2, 2, False)):
        args = arguments(**settings, moe_relu_max_experts=most)
        on_the_way = [("on the way", 2.0)] * (dense > 2)
        assert estimate.phases(args) == [("dense first stage", dense), *on_the_way, ("steady stage", 1)]
        times, tokens = 6 if recomputed else 4, 64 * 32 / 8
        assert memory.exchanged_bytes(args, stages, dense) == times * 2 * tokens * dense * 7 / 8 * 64 * 4


def test_layers_of_multi_token_prediction_count() -> None:
    """Like one more layer, with its own logits and norms; in GPTModel as in HybridModel."""
    common = [*MODEL, *EXPERTS, "--moe-relu-routing"]
    predicting, hybrid, longer = (
        cost("--gpus", "8", "--", *common, *flags.split())
        for flags in (
            "--num-layers 2 --moe-layer-freq [0,1] --mtp-num-layers 1",
            "--hybrid-layer-pattern *-*E/*E",
            "--num-layers 3 --moe-layer-freq [0,1,1]",
        )
    )
    for label in ("activations", "FLOPs"):
        assert figures(predicting, label) == figures(hybrid, label)
    size, tokens = 2, 1024
    more = (6 * 768 * size + 51200 * 4) * tokens / 2**30  # hidden states, and the softmax in fp32
    assert figures(predicting, "activations")[-1] == pytest.approx(figures(longer, "activations")[-1] + more, abs=0.011)


@pytest.mark.parametrize(
    "flags", ["--bf16 --context-parallel-size 2 --fp8-format hybrid --fp8-param-gather", "--fp16 --fp4-format e2m1"]
)
def test_plans_for_gpus_that_a_cpu_could_not_train(flags: str) -> None:
    model = [word for word in MODEL if word != "--bf16"]
    sharded = ["--moe-relu-routing", "--moe-relu-activation-limit", "0", "--use-distributed-optimizer"]
    output = cost("--gpus", "8", "--", *model, *EXPERTS, *sharded, *flags.split())
    assert figures(output, "weights")[0] == pytest.approx(2 * figures(output, "total parameters")[0] / 2**30, abs=0.006)
    assert "count as bf16" in output and "--transformer-impl transformer_engine" not in output


def test_layers_whose_flops_are_not_counted() -> None:
    args = arguments(hybrid_layer_pattern="M-")
    text = "\n".join(estimate._compute_lines(args, argparse.Namespace(), 1, 1000, 0))
    assert "1,000 per token" in text and "not known" in text and "M-" in text


def test_optimizer_bytes() -> None:
    common = {"optimizer": "adam", "accumulate_allreduce_grads_in_fp32": True, "world_size": 4}
    common |= {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None}
    common |= {"padded_vocab_size": 128, "cross_entropy_loss_fusion": False, "expert_model_parallel_size": 2}
    common |= {"use_precision_aware_optimizer": False}
    stages = [Stage(shared=1000, experts=400, layers=("*E", "*E"))]
    plain = memory.stage_memory(arguments(bf16=True, use_distributed_optimizer=False, **common), stages, 0, 1)
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * 1400, 4 * 1400, 12 * 1400)
    split = memory.stage_memory(arguments(bf16=True, use_distributed_optimizer=True, **common), stages, 0, 1)
    assert split.optimizer == 12 * (1000 / 4 + 400 / 2)
    for strategy, whole in (("no_shard", 3), ("optim", 2), ("optim_grads", 1), ("optim_grads_params", 0)):
        common |= {"use_megatron_fsdp": True, "data_parallel_sharding_strategy": strategy}
        found = memory.stage_memory(arguments(bf16=True, use_distributed_optimizer=True, **common), stages, 0, 1)
        parts = [(1400 if number < whole else 1000 / 4 + 400 / 2) for number in range(3)]
        assert (found.weights, found.gradients, found.optimizer) == (2 * parts[0], 4 * parts[1], 12 * parts[2])
    common["use_megatron_fsdp"] = False
    single = memory.stage_memory(arguments(use_distributed_optimizer=False, **common), stages, 0, 1)
    assert (single.weights, single.optimizer) == (4 * 1400, 8 * 1400)
