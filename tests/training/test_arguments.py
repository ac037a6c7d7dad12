"""Flags: granularity, values out of range, and every combination that ReLU routing refuses."""

import argparse
import sys

import pytest

from megatron.remoe import pretrain
from megatron.remoe.preflight.removed_flags import REMOVED
from megatron.remoe.routing.config import ReMoEConfig
from megatron.remoe.routing.refusals import REFUSALS, flag
from megatron.remoe.training import arguments
from megatron.remoe.training.arguments import add_remoe_arguments, apply_granularity, parse_and_validate_args
from megatron.training.arguments import add_megatron_arguments, parse_args
from tests.trainings import TINY
from tools.common.tiny_model import EXPERTS, RELU, TOPK


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *arguments])
    return parse_args(add_remoe_arguments)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which these arguments are refused."""
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *arguments])
    with pytest.raises(SystemExit) as stop:
        parse_and_validate_args()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") <= 4, "a message of a few lines"
    return message


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch)
    assert args.moe_relu_routing is False
    assert args.moe_relu_l1_reg_coeff_init == 1e-8
    assert args.moe_relu_l1_reg_coeff_multiplier == 1.2
    assert args.moe_granularity == 1


@pytest.mark.parametrize(
    ("flags", "minutes", "seconds_after"),
    [
        ([], 60, 600),
        (["--distributed-timeout-minutes", "30"], 30, None),
        (["--distributed-timeout-seconds-after-init", "90"], 60, 90),
        (["--distributed-timeout-minutes", "10", "--distributed-timeout-seconds-after-init", "90"], 10, 90),
    ],
)
def test_timeouts(flags: list[str], minutes: int, seconds_after: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank may take long for the data's index; after the first step a rank that hangs is found as before."""
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *flags])
    args = arguments.parse_args()
    assert (args.distributed_timeout_minutes, args.distributed_timeout_seconds_after_init) == (minutes, seconds_after)


def test_tensor_parallelism_before_blackwell_asks_for_its_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron's own message suffices where the launch scripts, which set it, are not used."""
    monkeypatch.setattr("megatron.training.arguments.get_device_arch_version", lambda: 9)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    message = refusal(monkeypatch, capsys, "--tensor-model-parallel-size", "2")
    assert "tensor model parallelism" in message and "CUDA_DEVICE_MAX_CONNECTIONS to 1" in message


def test_help_explains_all_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        parse_and_validate_args()
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--moe-relu-routing " in output and "--num-layers " in output and "%%" not in output
    assert "Minutes that ranks wait for each other. Default: 60" in " ".join(output.split())


@pytest.mark.parametrize("kind", [TOPK, RELU], ids=["top-k", "relu"])
def test_granularity(kind: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, *kind, "--moe-granularity", "4", "--moe-router-topk", "2")
    apply_granularity(args)
    assert (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size) == (32, 8, 32)


def test_granularity_splits_the_dense_size_where_experts_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, "--num-experts", "8", "--moe-router-topk", "1", "--moe-granularity", "2")
    apply_granularity(args)
    assert (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size) == (16, 2, 64)


# Flags, and what their message has: flag and value, and the remedy.
WARMUP = "--moe-warmup-topk 6 --moe-warmup-steps 9"
BAD_VALUES = [
    ([], "--moe-relu-routing", "--moe-relu-routing needs experts", "--num-experts"),
    (RELU, "--moe-router-topk 8", "--moe-router-topk 8", "below --num-experts 8"),
    (RELU, "--moe-router-topk 0", "--moe-router-topk 0", "at least 1"),
    (TOPK, "--moe-warmup-topk 6", "--moe-warmup-topk and --moe-warmup-steps", "give both"),
    (TOPK, "--moe-warmup-topk 1 --moe-warmup-steps 9", "--moe-warmup-topk 1", "above --moe-router-topk 1"),
    (TOPK, "--moe-warmup-topk 9 --moe-warmup-steps 9", "--moe-warmup-topk 9", "at most --num-experts 8"),
    (RELU, WARMUP, "--moe-warmup-topk cannot", "Leave it out"),
    (TOPK, f"{WARMUP} --moe-expert-capacity-factor 1", "factor 1.0 cannot be used with --moe-warmup", "Leave it out"),
    (RELU, "--moe-token-dispatcher-type alltoall_seq", "'alltoall_seq'", "its successor is alltoall."),
    (RELU, "--moe-relu-l1-reg-coeff-multiplier 1.0", "multiplier 1.0", "above 1"),
    (RELU, "--moe-relu-l1-reg-coeff-init 0", "init 0.0", "positive"),
    (RELU, "--moe-relu-l1-reg-coeff-init=-1e-8", "init -1e-08", "positive"),
    (RELU, "--moe-relu-l1-reg-coeff-init nan", "init nan", "positive"),
    (RELU, "--moe-relu-layer-floor 1", "--moe-relu-layer-floor 1.0", "below 1"),
    (TOPK, "--moe-granularity 0", "--moe-granularity 0", "at least 1"),
    ([], "--moe-granularity 2", "--moe-granularity 2", "--num-experts"),
    (RELU, "--moe-granularity 3", "--moe-ffn-hidden-size 128", "divisor"),
]


@pytest.mark.parametrize(("kind", "flags", "given", "remedy"), BAD_VALUES)
def test_bad_value(
    kind: list[str],
    flags: str,
    given: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = refusal(monkeypatch, capsys, *kind, *flags.split())
    assert given in message and remedy in message


REFUSED = {
    "moe_expert_capacity_factor": ["1.0"],
    "moe_pad_expert_input_to_capacity": [],
    "moe_pad_experts_for_cuda_graph_inference": [],
    "moe_expert_rank_capacity_factor": ["1.5"],
    "moe_paged_stash": [],
    "moe_permute_fusion": [],
    "moe_enable_deepep": [],
    "moe_enable_routing_replay": [],
    "moe_apply_probs_on_input": [],
    "moe_router_padding_for_quantization": [],
    "moe_aux_loss_coeff": ["1e-2", "--moe-router-load-balancing-type", "global_aux_loss"],
    "moe_router_enable_expert_bias": [],
    "moe_router_load_balancing_type": ["global_aux_loss"],
    "moe_router_score_function": ["sigmoid"],
    "moe_router_topk_scaling_factor": ["2.5"],
    "moe_router_num_groups": ["2"],
    "moe_router_group_topk": ["1"],
    "moe_router_fusion": [],
    "moe_router_force_biased": ["0.1"],
    "moe_router_force_load_balancing": [],
    "moe_use_upcycling": [],
    "moe_latent_size": ["32"],
    "cuda_graph_impl": ["full_iteration"],
    "transformer_impl": ["inference_optimized"],
    "multi_latent_attention": [],
    "heterogeneous_layers_config_path": ["layers.json"],
    "heterogeneous_layers_config_encoded_json": ["{}"],
    "use_megatron_fsdp": [],
    "use_torch_fsdp2": [],
    "init_model_with_meta_device": [],
    # without a flag: in a configuration only
    "moe_token_dropping": None,
    "moe_router_topk_limited_devices": None,
    "use_inference_optimized_layers": None,
}


def test_every_refusal_is_tested() -> None:
    assert {entry.name for entry in REFUSALS} == set(REFUSED)


@pytest.mark.parametrize("name", [name for name, value in REFUSED.items() if value is not None])
def test_refused_combination(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    value = REFUSED[name]
    message = refusal(monkeypatch, capsys, *RELU, flag(name), *value)
    entry = next(entry for entry in REFUSALS if entry.name == name)
    shown = value[0].replace("1e-2", "0.01") if value else "(on)"
    assert f"{flag(name)} {shown} cannot be used with --moe-relu-routing" in message
    assert entry.remedy in message


def test_graphs_over_moe_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    graphs = ["--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn", "moe_router"]
    message = refusal(monkeypatch, capsys, *RELU, *graphs)
    assert "--cuda-graph-modules attn moe_router" in message and "--cuda-graph-impl none" in message


# From its scripts/train_llama_182m_remoe.sh, but for data, sizes and what trains.
OF_THE_FORK = """
--use-mcore-models --no-masked-softmax-fusion --no-position-embedding --rotary-base 1000000 --use-flash-attn
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall
--overlap-param-gather --overlap-grad-reduce --moe-router-pre-softmax --moe-relu-routing --moe-grouped-gemm
--moe-layer-recompute --moe-granularity 1 --use-distributed-optimizer --sequence-parallel
"""


def test_flags_of_the_fork_are_taken_and_what_it_ignores_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *EXPERTS, *OF_THE_FORK.split()])
        args = arguments.parse_args()
        assert args.moe_router_load_balancing_type == "none"
        assert not args.moe_aux_loss_coeff and not args.moe_router_pre_softmax
        told.append([line for line in capsys.readouterr().err.splitlines() if "ignored" in line])
    assert told[1] == [] and len(told[0]) == 1
    for ignored in (
        "--moe-router-load-balancing-type aux_loss",
        "--moe-aux-loss-coeff 0.01",
        "--moe-router-pre-softmax",
    ):
        assert ignored in told[0][0]


@pytest.mark.parametrize(
    "given", ["none --moe-aux-loss-coeff 1e-2", "sinkhorn", "seq_aux_loss --moe-aux-loss-coeff 1e-2"]
)
def test_any_load_balancing_of_the_fork_is_ignored_as_there(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--moe-router-load-balancing-type", *given.split()]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *RELU, *words])
    args = arguments.parse_args()
    assert args.moe_router_load_balancing_type == "none" and not args.moe_aux_loss_coeff
    assert f"--moe-router-load-balancing-type {given.split()[0]}" in capsys.readouterr().err


def test_a_z_loss_is_used_and_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *RELU, "--moe-z-loss-coeff", "1e-3"])
    assert arguments.parse_args().moe_z_loss_coeff == 1e-3
    assert "--moe-z-loss-coeff 0.001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use-legacy-models"], "Leave it out"),
        (["--moe-extended-tp", "--s3-cache-path", "here"], "--object-storage-cache-path"),
        (["--retro-num-neighbors=2"], "RETRO"),
    ],
)
def test_flags_that_megatron_removed(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(monkeypatch, capsys, *RELU, *words)
    assert words[0].split("=")[0] in message and expected in message and "[REMOE-E211]" in message
    assert "Did you mean" not in message


def test_replacements_of_removed_flags_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = arguments.add_remoe_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    known = {option for action in parser._actions for option in action.option_strings}
    assert len(REMOVED) == 25 and not set(REMOVED) & known
    assert {replacement for _, replacement in REMOVED.values() if replacement} <= known


@pytest.mark.parametrize(("version", "code"), [("2.5.1", 2), ("2.10.0a0+nv26.1", None), ("2.15.0+cu132", None)])
def test_an_old_torch_is_refused_at_the_start(
    version: str, code: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain.importlib.metadata, "version", {"torch": version, "megatron-core": "0.19.2"}.get)
    if code is None:
        return pretrain.check_versions()
    with pytest.raises(SystemExit) as stop:
        pretrain.check_versions()
    error = capsys.readouterr().err
    assert stop.value.code == code and version in error and "[REMOE-E106]" in error


def test_refusals_hold_in_the_library_too() -> None:
    shape = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "moe_relu_routing": True}
    with pytest.raises(ValueError, match="--moe-expert-capacity-factor 1.0 cannot be used"):
        ReMoEConfig(**shape, num_moe_experts=4, moe_router_topk=1, moe_expert_capacity_factor=1.0)
    with pytest.raises(ValueError, match="needs experts"):
        ReMoEConfig(**shape)
    assert ReMoEConfig(**shape, num_moe_experts=4, moe_router_topk=1).target_sparsity == 0.75


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(monkeypatch, capsys, *RELU, "--moe-expert-capacity-factor", "1", "--moe-router-topk", "9")
    assert "--moe-expert-capacity-factor 1.0" in message and "--moe-router-topk 9" in message
