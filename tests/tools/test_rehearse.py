"""Test the rehearsal: its changes to the command line, what it simulates, and the launch commands' GPU path."""

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.remoe.files.gpt2_files import byte_level_vocabulary
from tests.launches import planned
from tests.trainings import REPOSITORY
from tools.console.errors import ToolError
from tools.console.files import write_json
from tools.plan.cost import choices
from tools.plan.rehearse import command, fake_ranks, report
from tools.plan.rehearse.arguments import parse_arguments
from tools.plan.rehearse.cards import rates
from tools.plan.rehearse.choose import keep, whole_step
from tools.plan.rehearse.flags import data_of, rehearsed, value_of
from tools.plan.rehearse.scripts import PLAIN, Launch

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="PyTorch is built for CPUs alone, and CUDA is what is played"
)
ONE_MICRO_BATCH = ("--global-batch-size", "128")  # of the 182M scripts on 8 GPUs; more micro-batches repeat the first
REMOE_182M = planned(Launch(flags=(*ONE_MICRO_BATCH, *PLAIN)))[1]
DENSE_182M = planned(Launch("dense", ONE_MICRO_BATCH))[1]
GOLDEN = REPOSITORY / "tests" / "golden" / "rehearsal.json"
CASES = {
    "ReMoE": Launch(),
    "top-k": Launch("moe"),
    "dense": Launch("dense"),
    "ReMoE, EP8": Launch(settings={"EP": "8"}),
    "ReMoE, TP2": Launch(settings={"TP": "2"}),
    "ReMoE, PP2 with virtual stages": Launch(settings={"PP": "2", "VPP": "2"}),
    "ReMoE, hybrid": Launch(settings={"MODEL": "hybrid"}),
    "ReMoE, PP2 with virtual stages, hybrid": Launch(settings={"MODEL": "hybrid", "PP": "2", "VPP": "2"}),
    "ReMoE, G = 8": Launch(flags=("--moe-granularity", "8")),
    "ReMoE, MoE recomputed": Launch(flags=tuple("--recompute-granularity selective --recompute-modules moe".split())),
    "ReMoE, Megatron's layers": Launch(flags=("--no-local-layer-fusion",)),
    "ReMoE, Triton": Launch(settings={"KERNELS": "triton"}),
    "top-k, Triton": Launch("moe", settings={"KERNELS": "triton"}),
}
CASES = {name: replace(case, flags=(*ONE_MICRO_BATCH, *PLAIN, *case.flags)) for name, case in CASES.items()}
BULK = ("ReMoE, hybrid", "ReMoE, G = 8", "ReMoE, MoE recomputed", "ReMoE, Megatron's layers", "top-k, Triton")
BULK += ("ReMoE, PP2 with virtual stages, hybrid", "top-k", "dense", "ReMoE, TP2", "context parallelism", "no data")
ALLOWED = 1.02  # highest ratio of a figure to the committed one
REMOE = "--num-experts 8 --moe-router-topk 1 --moe-relu-routing".split()


def committed(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures of a rehearsal that are compared with the committed ones."""
    launches, waits = found["launches"], sum(wait["times"] for wait in found["host_syncs"])
    numbers = {"launches of a forward layer": launches["forward_layer"], "launches of λ's update": launches["update"]}
    numbers |= {"launches of a step": launches["step"], "waits of a step": waits}
    numbers |= {"GB moved in a step": round(found["roofline"]["bytes"] / 1e9, 1)}
    numbers |= {f"GiB, {stage}": round(peaks["peak_allocated_gib"], 2) for stage, peaks in found["stages"].items()}
    return {key: value for key, value in numbers.items() if value is not None}


def test_nothing_is_saved_and_the_rest_stays() -> None:
    given = "--save runs/x --load runs/x --data-path 1.0 a 2.0 b --lr 1e-4 --train-iters 60000 --cpu --bf16"
    given += " --vocab-size=300"
    assert data_of(given.split()) == ["1.0", "a", "2.0", "b"] and data_of(["--data-path", "made-up"]) == []
    kept = rehearsed([*given.split(), "--tokenizer-type", "NullTokenizer"], steps=6)
    assert not {"--save", "--load", "--data-path", "--cpu", "a", "2.0", "runs/x", "60000"} & set(kept)
    assert "--bf16" in kept and "--mock-data" in kept and value_of(kept, "--lr") == "1e-4"
    assert value_of(kept, "--train-iters") == "6" and value_of(kept, "--vocab-size") == "300"


def test_a_vocabulary_without_files_is_made_up(tmp_path: Path) -> None:
    files = [tmp_path / "encoder.json", tmp_path / "vocab.bpe"]
    flags = f"--tokenizer-type GPT2BPETokenizer --vocab-file {files[0]} --merge-file {files[1]}".split()
    assert value_of(rehearsed(flags, 1), "--tokenizer-type") == "NullTokenizer"
    for file in files:
        file.touch()
    assert value_of(rehearsed(flags, 1), "--tokenizer-type") == "GPT2BPETokenizer"


def test_stages_and_ranks_are_those_of_the_training() -> None:
    assert command.shares_of(REMOE, None) == {"dense": 0.5, "way": 0.9 * 0.25, "steady": 0.125}
    assert command.shares_of([*REMOE, "--moe-relu-activation-limit", "0"], None) == {"dense": 0.5, "steady": 0.125}
    assert command.shares_of(REMOE, "dense") == {"dense": 0.5}
    assert command.shares_of(REMOE[:-1], None) == {"steady": 0.125}
    assert command.shares_of([], None) == {"steady": 0.0}
    capped = [*REMOE, "--moe-relu-max-experts"]
    assert command.shares_of([*capped, "3"], None) == {"dense": 0.375, "way": 0.9 * 0.25, "steady": 0.125}
    assert command.shares_of([*capped, "2"], None) == {"dense": 0.25, "steady": 0.125}
    with pytest.raises(ToolError, match="--stage way: this training has none; it has steady"):
        command.shares_of([], "way")

    pipeline = ["--pipeline-model-parallel-size", "4"]
    assert [*command.ranks_of(pipeline, 16, None)] == [0, 8, 12] and [*command.ranks_of([], 16, None)] == [0]
    assert [*command.ranks_of(pipeline, 16, 15)] == [15]


def test_a_gpu_in_capitals() -> None:
    assert parse_arguments(["--gpu", "H100", "--", "--cpu"])[0].gpu == "h100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "9", "--", "--bf16"], "--gpus 9: give a multiple of --gpus-per-node 8"),
        (["--rank", "8", "--", "--bf16"], "--rank 8: give a number below 8"),
        (["--rate", "speed=1", "--", "--bf16"], "--rate speed=1"),
        (["--rate", "products=fast", "--", "--bf16"], "--rate products=fast"),
        (["--rate", "products=0", "--", "--bf16"], "--rate products=0"),
        (["--gpus-per-node", "-8", "--", "--bf16"], "--gpus-per-node"),
    ],
)
def test_flags_that_are_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (REMOE, "--moe-token-dispatcher-type alltoall"),
        ([*REMOE, "--moe-token-dispatcher-type", "allgather", *PLAIN], "--moe-token-dispatcher-type alltoall"),
        ([*REMOE, "--moe-token-dispatcher-type=alltoall"], "--transformer-impl local"),
        (["--bf16"], "--transformer-impl local"),
        (["--bf16", *PLAIN], "PyTorch built for CUDA"),
    ],
)
def test_what_cannot_be_played_is_no_verdict(
    flags: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the rehearsal cannot simulate a training, it names a remedy and does not report that the training fails."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)  # as without Transformer Engine
    monkeypatch.setattr(command.build, "about_torch", lambda: {"cuda": None, "__version__": "2.15.0+cpu"})
    assert command.main(["--", *flags]) == 1
    printed = capsys.readouterr()
    assert remedy in printed.err.replace("\n", " ") and "DOES NOT START" not in printed.out


def test_no_rank_is_said_to_have_failed() -> None:
    """PyTorch 2.11's watchdog looks in the store for a failed rank; if it found one, a rehearsal would not end."""
    store = fake_ranks._StoreOfOne()
    assert not store.check(["exception_dump"])
    store.set("mine", b"1")
    assert store.check(["mine"]) and not store.check(["mine", "exception_dump"])


def test_a_dry_run_shows_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_of_182m() -> list[dict[str, Any]]:
        wanted = {"gpu": "h100", "size": "182m", "kernels": "triton"}
        return [row for row in json.loads(choices.FILE.read_text()) if wanted.items() <= row.items()]

    rows = rows_of_182m()
    assert len(rows) > 1 and rows[0]["mfu"] == max(row["mfu"] for row in rows)
    assert all(0.1 < row["mfu"] < 0.7 and row["gib"] < 80 for row in rows)
    assert "choose.py --size 182m --gpu b200" in next(choices.lines("b200", 8, "182m", "torch"))
    shown = Launch(settings={"KERNELS": "triton"}).run(DRY_RUN="1", DATA_PATH="made-up")
    assert f"Micro-batch and EP by rehearsals: {rows[0]['made']}" in shown.stdout, shown.stderr
    write_json(tmp_path / "choices.json", rows)
    for place in ("tools.plan.cost.choices.FILE", "tools.plan.rehearse.choose.FILE"):
        monkeypatch.setattr(place, tmp_path / "choices.json")
    keep({name: rows[0][name] for name in ("gpu", "size", "kernels", "micro_batch", "ep")}, "today", None)
    assert [row["mfu"] for row in rows_of_182m()] == [*(row["mfu"] for row in rows[1:]), 0.0]
    assert [*choices.lines("h100", 8, "182m", "triton")][-1].endswith("does not fit")


@pytest.mark.parametrize("flops", [1e12, None])
def test_a_pipeline_idles_and_some_flops_are_not_known(flops: float | None) -> None:
    model = {"flops_per_sequence": flops, "sequences_per_gpu": 10, "bubble": 1.25, "forecast_gib": {}}
    record = {"kind": "each rank", "rank": 0, "starts": True, "error": None, "stages": {}, "guessed": []}
    record["model"] = model
    work = {"operations": 1, "bytes": 1e9, "flops": 1e12, "seconds": 0.1}
    record |= {"roofline": {"products": work}, "host": {"calls": 1, "seconds": 0.1, "step_seconds": 0.2}}
    options = argparse.Namespace(gpus=8, gpu="h100", rates=rates("h100"))
    found = report.summary([record], options)
    text = "\n".join(report.lines(found, options))
    assert found["roofline"]["stands_mfu"] == (flops and pytest.approx(10 * flops / (1.25 * 0.2) / 989e12, rel=1e-2))
    assert "1.25 times" in text and "250 ms" in text and ("MFU not known" in text) is (flops is None)


@needs_cuda_build
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.bulk] * (name in BULK)) for name in CASES])
def test_launch_commands(name: str, request: pytest.FixtureRequest) -> None:
    """Each command starts; its figures are at most 2 % above the committed ones (--update-golden renews them)."""
    found = CASES[name].rehearse()
    assert found["starts"], found["error"]
    figures, expected = committed(found), json.loads(GOLDEN.read_text())
    if request.config.getoption("--update-golden"):
        expected[name] = figures
        write_json(GOLDEN, expected)
    print(name, figures)
    assert {key: value for key, value in expected[name].items() if figures.get(key, 1e99) > value * ALLOWED} == {}
    for peaks in found["stages"].values():
        assert peaks["peak_allocated_gib"] <= peaks["peak_reserved_gib"] < 80
    if "recomputed" not in name:
        for stage, peaks in found["stages"].items():
            assert peaks["forecast_gib"] == pytest.approx(peaks["peak_allocated_gib"], rel=0.06), stage
    assert 0.1 < found["roofline"]["stands_mfu"] <= found["roofline"]["mfu"] < 0.7
    assert found["roofline"]["bytes"] > 1e9
    assert found["roofline"]["guessed"] == []
    assert all(wait["times"] > 0 and ":" in wait["where"] for wait in found["host_syncs"])
    kinds = {one["kind"] for one in found["collectives"]}
    assert "reduce_scatter_tensor" in kinds and ("all_to_all_single" in kinds) is ("EP8" in name)


@needs_cuda_build
def test_a_stage_without_data_takes_its_steps(tmp_path: Path) -> None:
    """A middle pipeline stage starts without data. In a real training the first rank tells it to train."""
    found, flags = tmp_path / "found.json", [*REMOE_182M, "--pipeline-model-parallel-size", "4"]
    assert command.main(["--gpus", "8", "--rank", "4", "--json", str(found), "--", *flags]) == 0
    record = json.loads(found.read_text())["ranks"][0]
    assert record["starts"] and record["model"]["stage"] == 2 and record["model"]["bubble"] == 7 / 4
    assert set(record["stages"]) == {"dense", "way", "steady"}


@needs_cuda_build
def test_a_dense_stage_is_rehearsed_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is saved. A layer waits once for each number of chunks that it tries; its chunks do not wait."""
    monkeypatch.chdir(tmp_path)  # relative paths are the caller's
    vocabulary, merges = byte_level_vocabulary(tmp_path)
    found, flags = tmp_path / "found.json", [*REMOE_182M, "--save", str(tmp_path / "run"), "--save-interval", "1"]
    flags += ["--vocab-file", vocabulary.name, "--merge-file", merges.name]
    own = ["--gpus", "8", "--stage", "dense", "--json", str(found), "--log", str(tmp_path / "log")]
    assert command.main([*own, "--", *flags]) == 0
    seen, printed = json.loads(found.read_text()), capsys.readouterr()
    assert set(seen["stages"]) == {"dense"} and seen["launches"]["forward_layer"] > 150  # several chunks
    assert sum(wait["times"] for wait in seen["host_syncs"] if "remoe/layer/" in wait["where"]) <= 3 * 12
    assert not (tmp_path / "run").exists() and (tmp_path / "log.rank0").stat().st_size
    assert all(line.startswith("rehearsal:") for line in printed.err.splitlines())
    assert "Nothing was trained, and no GPU was used" in printed.out


@pytest.mark.bulk
@needs_cuda_build
def test_topk_waits_where_no_kernel_takes_all_experts() -> None:
    """On an A100 each top-k layer waits once for its counts, the experts' sizes, as a ReLU layer does."""
    found = Launch("moe", (*ONE_MICRO_BATCH, *PLAIN, "--num-layers", "2"), settings={"GPU": "a100"}).rehearse()
    assert found["starts"], found["error"]
    assert sum(wait["times"] for wait in found["host_syncs"] if "remoe/layer/" in wait["where"]) == 2


@needs_cuda_build
def test_launch_ahead_waits_late() -> None:
    """Each layer waits once for its sizes, after launching the experts, which keeps the GPU busy."""
    flags = (*ONE_MICRO_BATCH, *PLAIN, "--num-layers", "2", "--moe-relu-launch-ahead")
    found = Launch(flags=flags, settings={"KERNELS": "triton"}).rehearse()
    assert found["starts"], found["error"]
    assert found["late_waits"] == 2 and not any("remoe/layer/" in wait["where"] for wait in found["host_syncs"])


GRAPH = (*ONE_MICRO_BATCH, *PLAIN, *"--num-layers 1 --no-check-for-nan-in-loss-and-grad".split())
GRAPH += ("--cuda-graph-impl", "full_iteration")
BOUNDED = tuple("--moe-relu-max-experts 2 --moe-relu-activation-limit 0".split())


@needs_cuda_build
def test_a_step_as_a_cuda_graph() -> None:
    """A capture refuses every device read by the host; ReMoE's layers and λ's update have none."""
    found = Launch(flags=(*GRAPH, *BOUNDED), settings={"KERNELS": "triton"}).rehearse()
    assert found["starts"], found["error"]
    assert not any("megatron/remoe/" in wait["where"] for wait in found["host_syncs"])


@pytest.mark.bulk
@needs_cuda_build
def test_no_cuda_graph_on_an_a100() -> None:
    """With top-k the capture fails because the host reads counts; ReMoE is refused before (E204)."""
    reads = Launch("moe", GRAPH, settings={"GPU": "a100"}).rehearse()
    assert not reads["starts"] and "graph capture" in reads["error"]
    refused = Launch(flags=(*GRAPH, *BOUNDED), settings={"KERNELS": "triton", "GPU": "a100"}).rehearse()
    assert not refused["starts"] and "E204" in refused["error"]


@needs_cuda_build
def test_a_whole_step_as_one_row() -> None:
    step = whole_step(Launch(flags=(*PLAIN, "--num-layers", "1")), 64)
    assert step is not None and step["gib"] < 80 and step["launches"] > step["layer"] > 10
    assert 0.05 < step["mfu"] < step["free_mfu"] < 0.7 and 0 < step["gpu"] <= step["stands"]
    assert whole_step(Launch(flags=PLAIN, size="978m"), 64) is None


@needs_cuda_build
@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("routing", ["remoe", "moe", "dense"])
def test_transformer_engine(routing: str) -> None:
    found = Launch(routing, ONE_MICRO_BATCH).rehearse()
    assert found["starts"], found["error"]
    assert found["launches"]["forward_layer"] < 100


CAPACITY = "--moe-expert-capacity-factor 1.0"
REFUSED = {
    "context parallelism": ([*REMOE_182M, "--context-parallel-size", "2"], "only supported by TEDotProductAttention"),
    "no data": ([*DENSE_182M, "--data-path", "1.0", "nowhere/a"], "--data-path nowhere/a: there is no nowhere/a.idx"),
    "refused": ([*REMOE_182M, *CAPACITY.split()], f"{CAPACITY} cannot be used"),
    "out of memory": ([*REMOE_182M, *"--micro-batch-size 128 --global-batch-size 1024".split()], "out of memory"),
}


@needs_cuda_build
@pytest.mark.parametrize(
    ("flags", "words"),
    [pytest.param(*case, id=name, marks=[pytest.mark.bulk] * (name in BULK)) for name, case in REFUSED.items()],
)
def test_a_training_that_does_not_start(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The rehearsal prints the error of the real training."""
    assert command.main(["--gpus", "8", "--", *flags]) == 1
    output = capsys.readouterr().out
    assert "THE TRAINING DOES NOT START" in output and words in output
    assert ("take a smaller micro-batch" in output) is (words == "out of memory")
