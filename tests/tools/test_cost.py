"""The cost of a training before it starts: the paper's figures, layouts, memory against what PyTorch really keeps."""

import argparse
import subprocess
import sys

import pytest
import torch

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.remoe.local.hybrid import local_hybrid_stack_spec
from megatron.remoe.moe.specs import with_fused_layers, with_relu_routing
from megatron.training.training import num_floating_point_operations
from tests.layers import make_config
from tests.trainings import REPOSITORY
from tools.common.flags import parse
from tools.cost import activations, memory
from tools.cost.parameters import Stage
from tools.recipes.flops import arguments_of, flops_per_sequence

MODEL = """
--num-layers 12 --hidden-size 768 --num-attention-heads 12 --ffn-hidden-size 3072 --group-query-attention
--num-query-groups 4 --seq-length 1024 --max-position-embeddings 1024 --normalization RMSNorm --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope --attention-dropout 0
--hidden-dropout 0 --make-vocab-size-divisible-by 1024 --micro-batch-size 1 --global-batch-size 512
--train-iters 100 --lr 5e-4 --bf16 --tokenizer-type NullTokenizer --vocab-size 50257
""".split()
EXPERTS = "--num-experts 8 --moe-router-topk 1 --moe-ffn-hidden-size 3072 --moe-token-dispatcher-type alltoall".split()


TENSOR_PARALLEL = ["--sequence-parallel", "--tensor-model-parallel-size"]


def cost(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / "cost"), *arguments], capture_output=True, text=True, timeout=120
    )


def figures(output: str, label: str) -> list[float]:
    """The numbers of the line that begins with the label."""
    line = next(line for line in output.splitlines() if line.strip().startswith(label))
    return [float(word.replace(",", "")) for word in line.split() if word.replace(",", "").replace(".", "").isdigit()]


def test_layout_is_megatrons() -> None:
    """By hand: four stages of three layers, tensor parallel 2 splits attention, expert parallel 4 the experts."""
    layout = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4"
    layout += " --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --use-distributed-optimizer"
    result = cost("--gpus", "32", "--", *MODEL, *EXPERTS, "--moe-relu-routing", *layout.split())
    assert result.returncode == 0, result.stderr
    hidden, ffn, vocabulary = 768, 3072, 51200
    attention = (2 * hidden * hidden + 2 * hidden * 256) // 2
    shared = (
        3 * (attention + 8 * hidden + 2 * hidden) + vocabulary * hidden // 2 + hidden
    )  # the last stage: output, norm
    experts = 3 * 2 * 3 * hidden * ffn
    gib = 2**30
    assert figures(result.stdout, "weights")[0] == pytest.approx(2 * (shared + experts) / gib, abs=0.006)
    assert figures(result.stdout, "gradients")[0] == pytest.approx(4 * (shared + experts) / gib, abs=0.006)
    # 8 GPUs a stage: 4 copies of what is shared, 2 of each expert.
    assert figures(result.stdout, "optimizer")[0] == pytest.approx(12 * (shared / 4 + experts / 2) / gib, abs=0.006)
    dense, on_the_way, steady = figures(result.stdout, "activations")
    assert on_the_way > max(dense, steady), "before it the layers work in chunks that are computed again"
    assert "in the fullest of 4 pipeline stages" in result.stdout


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
    result = cost("--gpus", gpus, "--", *MODEL, *EXPERTS, "--moe-relu-routing", *flags)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr and result.stderr.count("\n") <= 4


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--gpus", "0"], "--gpus: '0': give a whole number of at least 1"),
        (["--gpus", "1", "--utilization", "40"], "--utilization 40.0: give a share"),
        (["--gpus", "1", "--gpu", "tpu"], "--gpu tpu is not in the list"),
        (["--gpus", "1", "--paper", "7b", "dense"], "--paper 7b dense"),
        ([], "--gpus"),
    ],
)
def test_own_flags_that_are_wrong(own: list[str], message: str) -> None:
    result = cost(*own, "--", *MODEL)
    assert result.returncode == 2 and message in result.stderr


def test_an_unlisted_gpu_and_what_does_not_fit() -> None:
    own = "--gpus 1 --gpu mine --tflops 100 --memory 1 --utilization 0.5".split()
    result = cost(*own, "--", *MODEL, *EXPERTS, "--moe-relu-routing")
    assert result.returncode == 0, result.stderr
    assert "Plan: 1 x mine (1 GiB, 100 TFLOP/s dense bf16)" in result.stdout
    assert "GiB are more than a mine has" in result.stdout
    flops = 100 * 512 * figures(result.stdout, "996")[0] * 1e9
    assert figures(result.stdout, "time")[0] == pytest.approx(flops / (100e12 * 0.5) / 60, abs=0.1)


def arguments(**changes: object) -> argparse.Namespace:
    """What the activations depend on, of a layer in fp32 on plain PyTorch."""
    settings: dict[str, object] = {
        "bf16": False,
        "fp16": False,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "moe_ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "micro_batch_size": 3,
        "seq_length": 32,
        "hybrid_layer_pattern": None,
        "num_experts": 4,
        "moe_shared_expert_intermediate_size": None,
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": False,
        "moe_pad_expert_input_to_capacity": False,
        "sequence_parallel": False,
        "swiglu": True,
        "bias_swiglu_fusion": False,
        "bias_gelu_fusion": False,
        "transformer_impl": "local",
        "local_layer_fusion": False,
        "moe_relu_routing": True,
        "moe_relu_activation_limit": 0.0,
        "moe_router_topk": 1,
        "recompute_granularity": None,
        "recompute_modules": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "distribute_saved_activations": False,
    }
    return argparse.Namespace(**settings | changes)


def kept_by_pytorch(args: argparse.Namespace, sublayers: str) -> tuple[float, float]:
    """Bytes that a real layer keeps for backward, its parameters not counted, and its active experts per token."""
    experts = "E" in sublayers
    config = make_config(
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
        spec = get_gpt_layer_local_spec(args.num_experts if experts else None, False)
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


def test_mixed_dense_and_expert_layers() -> None:
    def layers(number: int, **changes: object) -> list[str]:
        return [memory.sublayers(arguments(num_layers=number, **changes), layer + 1) for layer in range(number)]

    assert layers(4, moe_layer_freq=2) == ["*E", "*-"] * 2
    assert layers(3, moe_layer_freq=[0, 1, 1]) == ["*-", "*E", "*E"]
    assert layers(1, num_experts=None) == ["*-"]
    assert layers(4, hybrid_layer_pattern="*-|*E") == ["*", "-", "*", "E"]


def test_optimizer_bytes() -> None:
    common = {"optimizer": "adam", "accumulate_allreduce_grads_in_fp32": True, "world_size": 4}
    common |= {
        "num_layers": 2,
        "moe_layer_freq": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "padded_vocab_size": 128,
        "cross_entropy_loss_fusion": False,
    }
    common |= {"expert_model_parallel_size": 2, "use_precision_aware_optimizer": False}
    stages = [Stage(shared=1000, experts=400, layers=(1, 2))]
    plain = memory.stage_memory(arguments(bf16=True, use_distributed_optimizer=False, **common), stages, 0, 1)
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * 1400, 4 * 1400, 12 * 1400)
    split = memory.stage_memory(arguments(bf16=True, use_distributed_optimizer=True, **common), stages, 0, 1)
    assert split.optimizer == 12 * (1000 / 4 + 400 / 2)
    single = memory.stage_memory(arguments(use_distributed_optimizer=False, **common), stages, 0, 1)
    assert (single.weights, single.optimizer) == (4 * 1400, 8 * 1400)


COUNTED = {
    "dense": {"num_experts": None},
    "grouped queries, every second layer": {"moe_layer_freq": 2},
    "all heads": {"group_query_attention": False, "moe_layer_freq": [0, 1, 1]},
    "gated attention, shared experts": {"attention_output_gate": True, "moe_shared_expert_intermediate_size": 24},
    "GELU": {"swiglu": False},
    "experts in a latent space": {"moe_latent_size": 32},
    "multi-token prediction": {"mtp_num_layers": 1},
    "hybrid": {"hybrid_layer_pattern": "*-*E|EE*"},
    "latent attention": {"multi_latent_attention": True, "group_query_attention": False},
    "latent attention, queries too": {"multi_latent_attention": True, "group_query_attention": False, "q_lora_rank": 8},
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_megatrons_and_the_routers(name: str) -> None:
    """Megatron counts half of attention, no routers, and some norms, which are small."""
    latent = {"q_lora_rank": None, "kv_lora_rank": 12, "qk_head_dim": 16, "qk_pos_emb_head_dim": 4, "v_head_dim": 20}
    later = ("attention_output_gate", "experimental_attention_variant", "mtp_num_layers", "moe_latent_size")
    unused = ("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads", "linear_key_head_dim")
    unused += ("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_conv_kernel_dim")
    common: dict[str, object] = dict.fromkeys(later) | dict.fromkeys(unused, 1) | latent
    common |= {"num_layers": 3, "group_query_attention": True, "multi_latent_attention": False, "moe_layer_freq": 1}
    args = arguments(**{**common, "padded_vocab_size": 512, "moe_router_topk": 2, **COUNTED[name]})
    pattern, freq = args.hybrid_layer_pattern, args.moe_layer_freq
    layers = 3 if freq == 1 else 2
    layers = pattern.count("E") if pattern else (layers + (args.mtp_num_layers or 0)) * bool(args.num_experts)
    routers = 6 * args.seq_length * layers * args.hidden_size * args.num_experts if args.num_experts else 0
    found = flops_per_sequence(args)
    expected = num_floating_point_operations(args, 1, seqlen_squared_sum_in_batch=2 * args.seq_length**2)
    assert found - routers == pytest.approx(expected, rel=2e-3)
    assert args.num_experts is None or routers / found > 0.001


def test_flops_of_a_command_are_those_of_its_arguments() -> None:
    """Of one with granularity, as tools/cost reads them by Megatron's parser."""
    flags = [*MODEL, *EXPERTS, "--moe-relu-routing", "--moe-granularity", "4"]
    counted = flops_per_sequence(arguments_of(parse(flags)))
    assert figures(cost("--gpus", "8", "--", *flags).stdout, f"{counted / 1e9:,.0f}")


def test_layers_that_are_not_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="attention, MLP and experts"):
        flops_per_sequence(arguments(hybrid_layer_pattern="M-"))
