"""Test a rehearsal's command line, steps, report, and time model: collectives, products, the host. No simulation."""

import argparse

import pytest
import torch

from tests.scripts.launching import PLAIN
from tools.plan import rehearsal_report, rehearse
from tools.plan import roofline as engine
from tools.plan.gpus import GPUS, judge_memory
from tools.plan.rank_entry import choose_steps
from tools.plan.step_time import StepTime, collective_seconds, grouped_share, host_seconds, rates, waiting_seconds
from tools.recipes.megatron_values import make_parser

REMOE = "--num-experts 8 --moe-router-topk 1 --moe-relu-routing".split()


def test_flags_of_a_rehearsal() -> None:
    """Flags for saving, loading and data are dropped, others stay. NullTokenizer replaces missing vocabulary files."""
    given = "--save runs/x --load runs/x --data-path 1.0 a 2.0 b --lr 1e-4 --train-iters 60000 --cpu --bf16".split()
    given += "--tokenizer-type GPT2BPETokenizer --vocab-file no/encoder.json --merge-file no/vocab.bpe".split()
    given += "--lr-decay-style WSD --lr-wsd-decay-samples 64".split()
    parse = make_parser().parse_args
    kept = rehearse.rehearsal_flags(given, parse([word for word in given if word != "--cpu"]), steps=6)
    assert not {"--save", "--load", "--data-path", "--cpu", "a", "2.0", "runs/x", "60000"} & set(kept)
    values = parse(kept)
    assert values.bf16 and values.mock_data and (values.lr, values.train_iters) == (1e-4, 6)
    assert values.tokenizer_type == "NullTokenizer" and values.lr_wsd_decay_samples is None
    assert values.lr_wsd_decay_iters == 1


def test_steps_and_ranks() -> None:
    steps = choose_steps({"dense": 4.0, "way": 1.8, "steady": 1.0})
    assert [phase for phase, purpose in steps if purpose == "memory"] == ["dense", "way", "steady"]
    assert len(steps) == rehearse.MOST_STEPS and steps[-1] == ("steady", "roofline")
    assert [*rehearse.choose_ranks(4, 16)] == [0, 8, 12] and [*rehearse.choose_ranks(1, 16)] == [0]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpus", "9", "--", "--bf16"], "--gpus 9: give a multiple of --gpus-per-node 8"),
    (["--rate", "speed=1", "--", "--bf16"], "--rate: 'speed=1'"),
    (["--rate", "products=0", "--", "--bf16"], "--rate: '0'"),
    (["--gpu", "H100"], "after --"),
    (["--", "--bf16", "--use-tp-pp-dp-mapping"], "--use-tp-pp-dp-mapping"),
])  # fmt: skip
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rehearse.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "remedy"), [
    (REMOE, "--moe-token-dispatcher-type alltoall"),
    (["--use-checkpoint-args", "--load", "x"], "Give the model's flags"),
    (["--bf16", *PLAIN], "PyTorch built for CUDA"),
])  # fmt: skip
def test_runs_that_cannot_be_rehearsed(flags: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """If the rehearsal cannot simulate a run, it names a remedy and does not report that the training fails."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert rehearse.main(["--", *flags]) == 1
    printed = capsys.readouterr()
    assert remedy in printed.err.replace("\n", " ") and "DOES NOT START" not in printed.out


def test_mfu_of_a_pipeline() -> None:
    model = {"step_flops": 1e13, "bubble": 1.25, "forecast_gib": {"steady": 1.0}}
    record = {"kind": "stage 1", "rank": 0, "starts": True, "error": None, "model": model, "collectives": []}
    record["stages"] = {"steady": {"peak_allocated_gib": 1.0, "peak_reserved_gib": 1.0}}
    work = {"operations": 1, "bytes": 1e9, "flops": 1e12, "seconds": 0.1}
    record |= {"roofline": {"products": work}, "calls": 0, "launches": 20_000, "host_syncs": {}}
    options = argparse.Namespace(gpus=8, gpu="h100", rates=rates(GPUS["h100"]) | {"launch": 10.0}, iterations=0)
    figures = rehearsal_report.summarize([record], options)
    text = "\n".join(rehearsal_report.write_lines(figures, options))
    assert figures["mfu"] == pytest.approx(1e13 / (1.25 * 0.2) / 989e12, rel=1e-2)
    assert "1.25 times" in text and "125 to 250 ms" in text and "MFU" in text


# ---------------------------------------------------------------- time model


def test_collectives_take_their_latency() -> None:
    """Ten all-reduces of 8 GB over 8 ranks of a node send 7/8 of the bytes twice, and each has log2(8) latencies."""
    one = {"kind": "all_reduce", "ranks": 8, "within_node": True, "times": 10, "bytes": 80e9}
    given = {"link": 400.0, "latency": 5.0, "network": 0.0, "network_latency": 0.0}
    assert collective_seconds(one, given) == pytest.approx(2 * 70e9 / 400e9 + 10 * 3 * 5e-6)


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(
    ("left", "right", "layout"), [("nk", "mk", "TN"), ("nk", "mn", "NN"), ("mk", "mn", "NT")], ids=["y", "dx", "dw"]
)
def test_work_of_engine_products(left: str, right: str, layout: str, is_grouped: bool) -> None:
    """A product takes 2 · m · k · n FLOPs and one pass over each matrix; accumulation reads the output once more."""
    sizes = {"m": 6, "k": 4, "n": 10}
    shapes = [*(tuple(sizes[letter] for letter in letters) for letters in (left, right)), (10, 4)]
    a, b, out = ([torch.empty(shape)] if is_grouped else torch.empty(shape) for shape in shapes)
    name, work_space = "te_general_grouped_gemm" if is_grouped else "generic_gemm", torch.empty(1000)
    rest = [None, None, None, None, None, None, None, work_space, 1000]
    for accumulate in (False, True):
        arguments = [a, layout[0] == "T", b, layout[1] == "T", out, *rest, accumulate]
        work = engine.measure_work(name, arguments, engine.call_tensors(name, arguments, {}, [out]))
        moved = 4 * (sum(x * y for x, y in shapes) + 10 * 4 * accumulate)
        assert work == (moved, 2 * 6 * 4 * 10, "grouped" if is_grouped else "products")


def test_work_of_engine_attention() -> None:
    """Attention has two products forward and five backward; causal attention needs half of each."""
    query, key = torch.empty(8, 2, 4, 16), torch.empty(8, 2, 2, 16)
    for name, products in (("fused_attn_fwd", 2), ("fused_attn_bwd", 5)):
        moved, flops, rate = engine.measure_work(name, [8, 8, query, key, key], [query, key])
        assert (moved, rate) == (query.nbytes + key.nbytes, "attention")
        assert flops == products * 2 * (2 * 4 * 8 * 8 * 16) / 2


def test_the_gpu_waits_for_the_host() -> None:
    host = host_seconds(1_000_000, 1_000_000, {"frame": 2.0, "launch": 3.0})
    assert host == pytest.approx(5.0)
    assert waiting_seconds(host, 2.0) == 3.0 and 0 < waiting_seconds(host, 10.0) < 1.0


def test_small_experts_and_heads_are_slower() -> None:
    """Products take 8.7 of 10.2 and 9.7 of 11.4 ms of step_time.py's published layers. Heads of 64 halve the rate."""
    for ffn, pairs, seconds in ((768, 32768 * 8, 8.7e-3), (512, 32768 * 10, 9.7e-3)):
        args = argparse.Namespace(moe_ffn_hidden_size=ffn, expert_tensor_parallel_size=1)
        roofline = engine.Roofline(args, rates(GPUS["h100"]), engine.EngineCalls())
        roofline.add(0, 6.0 * pairs * 2048 * ffn, "grouped", grouped_share(args))
        assert roofline.parts["grouped"]["seconds"] == pytest.approx(seconds, rel=0.05)
    for latent, tflop in ((False, 227.5), (True, 455)):
        heads = {"kv_channels": 64, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64}
        args = argparse.Namespace(multi_latent_attention=latent, **heads)
        roofline = engine.Roofline(args, rates(GPUS["h100"]), engine.EngineCalls())
        roofline.add(0, tflop * 1e12, "attention")
        assert roofline.parts["attention"]["seconds"] == pytest.approx(1.0, rel=0.01)


def test_hours_from_and_to() -> None:
    """At best, nothing waits and collectives are hidden; at most, the parts add up."""
    time = StepTime(products=0.2, traffic=0.1, waiting=0.1, links=0.1, network=0.6, bubble=1.5)
    assert (time.least, time.most) == pytest.approx((0.45, 0.6 + 0.7)) and "between nodes (46%)" in time.limit()
    text = "\n".join(rehearsal_report.time_lines(time, 3600))
    assert "27.0 minutes, 1.3 hours" in text and "450 to 1,300 ms" in text
    assert [*judge_memory(70.0, GPUS["h100"])] == ["Fits: 70.0 of 80 GiB"]
    for needed in (90.0, None):
        assert "DOES NOT FIT" in [*judge_memory(needed, GPUS["h100"])][-1]
