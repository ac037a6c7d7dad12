"""Test a rehearsal's command line, what it simulates, and its report; nothing is simulated here."""

import argparse

import pytest
import torch

from tests.launches import PLAIN
from tools.plan import rehearsal_report, rehearse
from tools.plan.gpus import rates
from tools.plan.rank_entry import plan_steps
from tools.recipes.megatron_values import make_parser

REMOE = "--num-experts 8 --moe-router-topk 1 --moe-relu-routing".split()


def test_flags_of_a_rehearsal() -> None:
    """Nothing is saved, and the rest stays. A vocabulary whose files are missing is made up."""
    given = "--save runs/x --load runs/x --data-path 1.0 a 2.0 b --lr 1e-4 --train-iters 60000 --cpu --bf16".split()
    given += "--tokenizer-type GPT2BPETokenizer --vocab-file no/encoder.json --merge-file no/vocab.bpe".split()
    parse = make_parser().parse_args
    kept = rehearse.rehearsal_flags(given, parse([word for word in given if word != "--cpu"]), steps=6)
    assert not {"--save", "--load", "--data-path", "--cpu", "a", "2.0", "runs/x", "60000"} & set(kept)
    values = parse(kept)
    assert values.bf16 and values.mock_data and (values.lr, values.train_iters) == (1e-4, 6)
    assert values.tokenizer_type == "NullTokenizer"


def test_steps_and_ranks() -> None:
    steps = plan_steps({"dense": 4.0, "way": 1.8, "steady": 1.0})
    assert [phase for phase, purpose in steps if purpose == "memory"] == ["dense", "way", "steady"]
    assert len(steps) == rehearse.MOST_STEPS and steps[-1] == ("steady", "roofline")
    assert [*rehearse.choose_ranks(4, 16)] == [0, 8, 12] and [*rehearse.choose_ranks(1, 16)] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "9", "--", "--bf16"], "--gpus 9: give a multiple of --gpus-per-node 8"),
        (["--rate", "speed=1", "--", "--bf16"], "--rate: 'speed=1'"),
        (["--rate", "products=0", "--", "--bf16"], "--rate: '0'"),
        (["--gpu", "H100"], "after --"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rehearse.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (REMOE, "--moe-token-dispatcher-type alltoall"),
        (["--bf16", *PLAIN], "PyTorch built for CUDA"),
    ],
)
def test_runs_that_cannot_be_rehearsed(
    flags: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the rehearsal cannot simulate a run, it names a remedy and does not report that the training fails."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert rehearse.main(["--", *flags]) == 1
    printed = capsys.readouterr()
    assert remedy in printed.err.replace("\n", " ") and "DOES NOT START" not in printed.out


@pytest.mark.parametrize("flops", [1e13, None])
def test_mfu_of_a_pipeline(flops: float | None) -> None:
    model = {"step_flops": flops, "bubble": 1.25, "forecast_gib": {"steady": 1.0}}
    record = {"kind": "stage 1", "rank": 0, "starts": True, "error": None, "model": model, "collectives": []}
    record["stages"] = {"steady": {"peak_allocated_gib": 1.0, "peak_reserved_gib": 1.0}}
    work = {"operations": 1, "bytes": 1e9, "flops": 1e12, "seconds": 0.1}
    record |= {"roofline": {"products": work}, "calls": 0, "launches": 20_000, "host_syncs": {}}
    options = argparse.Namespace(gpus=8, gpu="h100", rates=rates("h100") | {"launch": 10.0}, iterations=0)
    figures = rehearsal_report.summarize([record], options)
    text = "\n".join(rehearsal_report.write_lines(figures, options))
    assert figures["mfu"] == (flops and pytest.approx(flops / (1.25 * 0.2) / 989e12, rel=1e-2))
    assert "1.25 times" in text and "125 to 250 ms" in text and ("MFU" in text) is (flops is not None)
