"""Test the flags: granularity, values out of range, and settings that ReLU routing refuses."""

import argparse
import sys
from collections.abc import Callable

import pytest

from megatron.remoe.start.messages import usage_errors
from megatron.remoe.training import arguments
from tests.tiny_model import EXPERTS, RELU, TOPK
from tests.training_runs import REPOSITORY, TINY

Parse = Callable[..., argparse.Namespace]


def select_words(*flags: str | list[str]) -> list[str]:
    """Return one list of words; strings are split at spaces."""
    return [word for each in flags for word in (each.split() if isinstance(each, str) else each)]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Return a function that parses a tiny model's flags and the given ones."""

    def parse_all(*flags: str | list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *TINY, *select_words(*flags)])
        return arguments.parse_args()

    return parse_all


@pytest.fixture
def refusal(parse: Parse, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that parses flags which must be refused, and returns the message."""

    def refused(*flags: str | list[str]) -> str:
        with pytest.raises(SystemExit) as stop, usage_errors():
            parse(*flags)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") <= 4, "a message of a few lines"
        return message

    return refused


def test_help_explains_all_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        arguments.parse_args()
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--moe-relu-routing " in output and "--num-layers " in output and "%%" not in output


@pytest.mark.parametrize("kind", [TOPK, RELU, "--num-experts 8"], ids=["top-k", "relu", "the dense size"])
def test_granularity(kind: list[str] | str, parse: Parse) -> None:
    loaded = parse("", "--moe-granularity 4 --moe-relu-max-experts 3 --use-checkpoint-args --load x")
    assert (loaded.num_experts, loaded.moe_relu_max_experts) == (None, 12), "the checkpoint has the split experts"
    args = parse(kind, "--moe-granularity 4 --moe-router-topk 2")
    assert (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size) == (32, 8, 32)


# Flags in two parts, then two parts of the message: flag and value, and the remedy.
WARMUP = "--moe-warmup-topk 6 --moe-warmup-steps 9"
GRAPHS = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router"
BAD_VALUES = [
    ("", "--moe-relu-routing", "--moe-relu-routing needs experts", "--num-experts"),
    (RELU, "--moe-router-topk 8", "--moe-router-topk 8", "below --num-experts 8"),
    (TOPK, "--moe-warmup-topk 6", "--moe-warmup-topk and --moe-warmup-steps", "give both"),
    (TOPK, "--moe-warmup-topk 9 --moe-warmup-steps 9", "--moe-warmup-topk 9", "at most --num-experts 8"),
    (RELU, WARMUP, "--moe-warmup-topk cannot", "Leave it out"),
    (TOPK, f"{WARMUP} --moe-expert-capacity-factor 1", "factor 1.0 cannot be used with --moe-warmup", "Leave it out"),
    (RELU, "--moe-relu-l1-reg-coeff-multiplier 1.0", "multiplier 1.0", "above 1"),
    (RELU, "--moe-relu-l1-reg-coeff-init nan", "init nan", "positive"),
    (RELU, "--moe-relu-max-experts 9", "--moe-relu-max-experts 9", "8"),
    (RELU, "--moe-relu-layer-floor 1", "--moe-relu-layer-floor 1.0", "below 1"),
    (TOPK, "--moe-granularity 0", "--moe-granularity 0", "at least 1"),
    ("", "--moe-granularity 2", "--moe-granularity 2", "--num-experts"),
    (RELU, "--moe-granularity 3", "--moe-ffn-hidden-size 128", "divisor"),
    (RELU, GRAPHS, "--cuda-graph-modules attn moe_router", "--cuda-graph-impl none"),
    (RELU, "--moe-expert-capacity-factor 1 --moe-router-topk 9", "factor 1.0", "--moe-router-topk 9"),  # both at once
]


@pytest.mark.parametrize(("kind", "flags", "given", "remedy"), BAD_VALUES)
def test_bad_value(kind: list[str] | str, flags: str, given: str, remedy: str, refusal: Callable[..., str]) -> None:
    message = refusal(kind, flags)
    assert given in message and remedy in message


# From the fork's scripts/train_llama_182m_remoe.sh, without flags for data, sizes and hyperparameters.
FORK_FLAGS = """
--use-mcore-models --no-masked-softmax-fusion --no-position-embedding --rotary-base 1000000 --use-flash-attn
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall
--overlap-param-gather --overlap-grad-reduce --moe-router-pre-softmax --moe-relu-routing --moe-grouped-gemm
--moe-layer-recompute --moe-granularity 1 --use-distributed-optimizer --sequence-parallel
"""
IGNORED = ["--moe-router-load-balancing-type aux_loss", "--moe-aux-loss-coeff 0.01", "--moe-router-pre-softmax"]


@pytest.mark.parametrize(("flags", "expected"), [
    ([*EXPERTS, *FORK_FLAGS.split()], IGNORED),
    ([*RELU, *"--moe-router-load-balancing-type none --moe-aux-loss-coeff 1e-2".split()], ["type none"]),
    ([*RELU, "--moe-router-load-balancing-type", "sinkhorn"], ["type sinkhorn"]),
])  # fmt: skip
def test_ignored_fork_flags_are_reported_once(flags, expected: list[str], parse: Parse, monkeypatch, capsys) -> None:
    ignored = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        args = parse(flags)
        assert args.moe_router_load_balancing_type == "none"
        assert not args.moe_aux_loss_coeff and not args.moe_router_pre_softmax
        ignored.append([line for line in capsys.readouterr().err.splitlines() if "ignored" in line])
    assert ignored[1] == [] and len(ignored[0]) == 1 and all(words in ignored[0][0] for words in expected)


def test_a_page_lists_every_flag() -> None:
    page = (REPOSITORY / "docs" / "flags.md").read_text()
    parser = arguments.add_remoe_arguments(argparse.ArgumentParser())
    flags = [action.option_strings for action in parser._actions if action.dest != "help"]
    assert len(flags) > 10
    assert not [names for names in flags if not any(f"`{name}`" in page for name in names)]
