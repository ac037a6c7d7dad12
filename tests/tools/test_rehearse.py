"""The rehearsal: what it changes in a command line, what it plays, and the GPU path of the launch commands in it."""

import importlib.util
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainings import REPOSITORY
from tools.common.errors import ToolError
from tools.common.files import write_json
from tools.cost import choices
from tools.rehearse import build, command, engine, fake_ranks, report
from tools.rehearse.cards import rates
from tools.rehearse.flags import data_of, rehearsed, value_of
from tools.rehearse.host import HostWork, step_seconds
from tools.rehearse.roofline import Roofline
from tools.rehearse.scripts import ONE_MICRO_BATCH, PLAIN, Launch, drawn_on

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="PyTorch is built for CPUs alone, and CUDA is what is played"
)
REMOE_182M = Launch(flags=(*ONE_MICRO_BATCH, *PLAIN))
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
ALLOWED = 1.02  # a figure may be this much above the committed one
REMOE = "--num-experts 8 --moe-router-topk 1 --moe-relu-routing".split()


def kept(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures that are committed."""
    launches, waits = found["launches"], sum(wait["times"] for wait in found["host_syncs"])
    numbers = {"launches of a forward layer": launches["forward_layer"], "launches of λ's update": launches["update"]}
    numbers |= {"launches of a step": launches["step"], "waits of a step": waits}
    numbers["GB moved in a step"] = round(found["roofline"]["bytes"] / 1e9, 1)
    for stage, peaks in found["stages"].items():
        numbers[f"GiB, {stage}"] = round(peaks["peak_allocated_gib"], 2)
    return {key: value for key, value in numbers.items() if value is not None}


def test_nothing_is_saved_and_the_rest_stays() -> None:
    given = "--save runs/x --load runs/x --data-path 1.0 a 2.0 b --lr 1e-4 --train-iters 60000 --cpu --bf16"
    given += " --vocab-size=300"
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


def test_data_are_those_of_the_command() -> None:
    assert data_of("--data-path 1.0 a 2.0 b --lr 1".split()) == ["1.0", "a", "2.0", "b"]
    assert data_of("--data-path a --data-path b".split()) == ["b"]
    assert data_of("--lr 1 --data-path made-up".split()) == data_of(["--lr", "1"]) == []


def test_stages_are_those_of_the_training() -> None:
    assert command.shares_of(REMOE, None) == {"dense": 0.5, "way": 0.9 * 0.25, "steady": 0.125}
    assert command.shares_of([*REMOE, "--moe-relu-activation-limit", "0"], None) == {"dense": 0.5, "steady": 0.125}
    assert command.shares_of(REMOE, "dense") == {"dense": 0.5}
    assert command.shares_of(REMOE[:-1], None) == {"steady": 0.125}
    assert command.shares_of([], None) == {"steady": 0.0}
    with pytest.raises(ToolError, match="--stage way: this training has none; it has steady"):
        command.shares_of([], "way")


def test_ranks_of_each_kind() -> None:
    pipeline = ["--pipeline-model-parallel-size", "4"]
    assert [rank.number for rank in command.ranks_of(pipeline, 16, "each-kind")] == [0, 8, 12]
    assert [rank.number for rank in command.ranks_of([], 16, "each-kind")] == [0]
    assert [rank.number for rank in command.ranks_of([], 3, "all")] == [0, 1, 2]
    assert [rank.number for rank in command.ranks_of([], 16, "15")] == [15]
    with pytest.raises(ToolError, match="--rank 16: give a number below 16"):
        command.ranks_of([], 16, "16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "9", "--", "--bf16"], "--gpus 9: give a multiple of --gpus-per-node 8"),
        (["--gpus", "8"], "give the training's flags behind --"),
        (["--rate", "speed=1", "--", "--bf16"], "--rate speed=1: is none of products"),
        (["--rate", "products=fast", "--", "--bf16"], "'fast' is no number"),
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
    ],
)
def test_what_cannot_be_played_is_no_verdict(
    flags: list[str], remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that starts on GPUs is not said to fail because the rehearsal cannot play it."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)  # as without Transformer Engine
    assert command.main(["--", *flags]) == 1
    printed = capsys.readouterr()
    assert remedy in printed.err.replace("\n", " ") and "DOES NOT START" not in printed.out


def test_torch_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command.main(["--", "--bf16", *PLAIN]) == 1
    assert "A rehearsal needs PyTorch built for CUDA" in capsys.readouterr().err.replace("\n", " ")


def test_no_rank_is_said_to_have_failed() -> None:
    """PyTorch 2.11's watchdog asks a store for that, and on a yes a rehearsal would not end."""
    store = fake_ranks._StoreOfOne()
    assert not store.check(["exception_dump"])
    store.set("mine", b"1")
    assert store.check(["mine"]) and not store.check(["mine", "exception_dump"])


def test_the_words_of_the_cluster() -> None:
    log = "...\nTraceback\npretrain_gpt.py: error: rank 0: ValueError: no\nDo this.\n"
    assert report.error_in(log, 1) == "pretrain_gpt.py: error: rank 0: ValueError: no\nDo this."
    assert report.error_in("one\ntwo", -11) == "exit code -11; the end of its output:\none\ntwo"


def test_collectives_take_their_latency() -> None:
    """By hand: ten of 8 GB over 8 ranks of a node, 7/8 of the bytes sent twice, and three doublings each."""
    one = {"kind": "all_reduce", "ranks": 8, "within_node": True, "times": 10, "bytes": 80e9}
    given = {"link": 400.0, "latency": 5.0, "network": 0.0, "network_latency": 0.0}
    (timed,) = report.timed([one, one | {"ranks": 1}], given)
    assert timed["seconds"] == pytest.approx(2 * 70e9 / 400e9 + 10 * 3 * 5e-6)


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(
    ("left", "right", "layout"), [("nk", "mk", "TN"), ("nk", "mn", "NN"), ("mk", "mn", "NT")], ids=["y", "dx", "dw"]
)
def test_work_of_engine_products(left: str, right: str, layout: str, is_grouped: bool) -> None:
    """Output, and gradients of rows and weights: two FLOPs for each of m k n, and one pass over each matrix."""
    sizes = {"m": 6, "k": 4, "n": 10}
    shapes = [*(tuple(sizes[letter] for letter in letters) for letters in (left, right)), (10, 4)]
    a, b, out = ([torch.empty(shape)] if is_grouped else torch.empty(shape) for shape in shapes)
    name, work_space = "te_general_grouped_gemm" if is_grouped else "generic_gemm", torch.empty(1000)
    rest = [None, None, None, None, None, None, None, work_space, 1000]
    for accumulate in (False, True):
        arguments = [a, layout[0] == "T", b, layout[1] == "T", out, *rest, accumulate]
        work = engine.work_of(name, arguments, engine.tensors_of(name, arguments, {}, [out]))
        moved = 4 * (sum(x * y for x, y in shapes) + 10 * 4 * accumulate)
        assert work == (moved, 2 * 6 * 4 * 10, "grouped" if is_grouped else "products")


def test_work_of_engine_attention() -> None:
    """Two products forward and five backward, of which causal attention needs half."""
    query, key = torch.empty(8, 2, 4, 16), torch.empty(8, 2, 2, 16)
    for name, products in (("fused_attn_fwd", 2), ("fused_attn_bwd", 5)):
        moved, flops, rate = engine.work_of(name, [8, 8, query, key, key], [query, key])
        assert (moved, rate) == (query.nbytes + key.nbytes, "attention")
        assert flops == products * 2 * (2 * 4 * 8 * 8 * 16) / 2


def test_the_gpu_waits_for_the_host() -> None:
    """By hand: a wait between two stretches, of two operations and of one."""
    host = HostWork([(0, 0), (1_000_000, 2), (1_000_000, 1_000_002)])
    assert host.seconds({"frame": 2.0, "launch": 3.0}) == pytest.approx([2.000006, 3.0])
    assert step_seconds([2.0, 3.0], [[5.0, 1.0], [0.5]]) == (1 + 5 + 1) + (3 + 0.5)
    assert step_seconds([2.0], [[0.25, 0.25]]) == 2.25
    assert step_seconds([0.0, 4.0], [[1.0, 1.0], []]) == 2 + 4
    assert step_seconds([1.0, 1.0], [[4.0, 4.0], [1.0]], [1]) == 8.5 + 1, "the first wait leaves an operation running"


def test_small_experts_and_heads_are_slower() -> None:
    """The published layers of cards.py, products alone: 8.7 and 9.7 of 10.2 and 11.4 ms."""
    for ffn, pairs, seconds in ((768, 32768 * 8, 8.7e-3), (512, 32768 * 10, 9.7e-3)):
        args = Namespace(moe_ffn_hidden_size=ffn, expert_tensor_parallel_size=1, kv_channels=64)
        roofline = Roofline(args, rates("h100"), engine.Calls())
        roofline._add("experts", 0, 6.0 * pairs * 2048 * ffn, "grouped", roofline._share_of_grouped())
        assert roofline.parts["experts"].seconds == pytest.approx(seconds, rel=0.05)
    roofline._add("attention", 0, 227.5e12, "attention")
    assert roofline.parts["attention"].seconds == pytest.approx(1.0, rel=0.01)


def test_steps_of_many_micro_batches_are_drawn_on() -> None:
    def rehearsal(number: int) -> dict[str, Any]:
        work = {"bytes": 10.0 + number, "seconds": 1.0 + number, "mfu": number / (1.0 + number)}
        work |= {"host_seconds": 0.5 + number, "stands_seconds": 2.0 + number}
        seen = {"roofline": work, "collectives": [{"seconds": 0.5 * number}]}
        launches = {"step": 100 + 10 * number, "forward_layer": 5}
        return seen | {"launches": launches, "stages": {"steady": {"peak_reserved_gib": 10.0}}}

    step = drawn_on([rehearsal(1), rehearsal(2)], 16)
    assert (step.launches, step.bytes, step.seconds, step.collectives) == (260, 26, 17, 8)
    assert (step.host, step.stands) == (16.5, 18)
    assert step.free_mfu == pytest.approx(16 / 25) and step.mfu == pytest.approx(16 / 26)
    assert drawn_on([rehearsal(3)], 3).free_mfu == pytest.approx(3 / 5.5)


def test_a_dry_run_shows_the_table() -> None:
    tables = choices.read()
    for name, table in tables.items():
        best = table["rows"][0]
        assert 0.1 < best["mfu"] < 0.7 and best["gib"] < 80 and best["mfu"] == max(r["mfu"] for r in table["rows"]), (
            name
        )
    assert "python tools/rehearse/choose.py --size 182m --gpu b200" in next(choices.lines("b200", 8, "182m", "torch"))
    shown = Launch(settings={"KERNELS": "triton"}).run(DRY_RUN="1", DATA_PATH="made-up")
    assert f"Micro-batch and EP by rehearsals: {tables['8 x h100, 182m, triton']['made']}" in shown.stdout, shown.stderr


@needs_cuda_build
@pytest.mark.parametrize("name", CASES)
def test_launch_commands(name: str, request: pytest.FixtureRequest) -> None:
    """They start, and launch, wait and hold no more than what is committed; --update-golden renews that."""
    found = CASES[name].rehearse()
    assert found["starts"], found["error"]
    figures, expected = kept(found), json.loads(GOLDEN.read_text())
    if request.config.getoption("--update-golden"):
        expected[name] = figures
        write_json(GOLDEN, expected)
    print(name, figures)
    assert {key: value for key, value in expected[name].items() if figures.get(key, 1e99) > value * ALLOWED} == {}
    for peaks in found["stages"].values():
        assert peaks["peak_allocated_gib"] <= peaks["peak_reserved_gib"] < 80
    if "PP2" not in name and "recomputed" not in name:
        for stage, peaks in found["stages"].items():
            assert peaks["forecast_gib"] == pytest.approx(peaks["peak_allocated_gib"], rel=0.06), stage
    assert 0.1 < found["roofline"]["stands_mfu"] <= found["roofline"]["mfu"] < 0.7
    assert found["roofline"]["bytes"] > 1e9
    assert found["roofline"]["guessed"] == []
    assert all(wait["times"] > 0 and ":" in wait["where"] for wait in found["host_syncs"])
    kinds = {(one["kind"], one["group"]) for one in found["collectives"]}
    assert any(kind == "reduce_scatter_tensor" for kind, _ in kinds)
    assert ("all_to_all_single" in {kind for kind, _ in kinds}) is ("EP8" in name)


def test_both_models_do_the_same() -> None:
    expected = json.loads(GOLDEN.read_text())
    hybrid = [name for name in CASES if name.endswith(", hybrid")]
    assert hybrid and [expected[name] for name in hybrid] == [
        expected[name.removesuffix(", hybrid")] for name in hybrid
    ]


@needs_cuda_build
def test_a_stage_without_data_takes_its_steps(tmp_path: Path) -> None:
    """In the middle of a pipeline there are no data, and what to do is heard from the first rank."""
    found, flags = tmp_path / "found.json", [*REMOE_182M.command(), "--pipeline-model-parallel-size", "4"]
    assert command.main(["--gpus", "8", "--rank", "4", "--json", str(found), "--", *flags]) == 0
    record = json.loads(found.read_text())["ranks"][0]
    assert record["starts"] and record["model"]["stage"] == 2 and set(record["stages"]) == {"dense", "way", "steady"}


@needs_cuda_build
def test_chunks_of_a_dense_stage_wait_for_nothing(tmp_path: Path) -> None:
    """A layer waits for its counts in one chunk, in as many as are needed, and at most once more; its chunks never."""
    found = tmp_path / "found.json"
    assert command.main(["--gpus", "8", "--stage", "dense", "--json", str(found), "--", *REMOE_182M.command()]) == 0
    seen = json.loads(found.read_text())
    assert set(seen["stages"]) == {"dense"} and seen["launches"]["forward_layer"] > 150  # several chunks
    assert sum(wait["times"] for wait in seen["host_syncs"] if "remoe/moe/" in wait["where"]) <= 3 * 12


@needs_cuda_build
def test_topk_waits_where_no_kernel_takes_all_experts() -> None:
    """On an A100 each layer waits for its counts, as ReLU's does, and experts have their sizes from these."""
    found = Launch("moe", (*ONE_MICRO_BATCH, *PLAIN, "--num-layers", "2"), settings={"GPU": "a100"}).rehearse()
    assert found["starts"], found["error"]
    assert sum(wait["times"] for wait in found["host_syncs"] if "remoe/moe/" in wait["where"]) == 2


@needs_cuda_build
def test_saves_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, small = tmp_path / "log", "--num-layers 2 --hidden-size 192 --moe-ffn-hidden-size 256 --global-batch-size 16"
    flags = [*REMOE_182M.command(), *small.split()]
    assert command.main(["--gpus", "1", "--resume", "--stage", "steady", "--log", str(log), "--", *flags]) == 0
    assert "takes its steps, saves a checkpoint, and goes on from it" in capsys.readouterr().out
    assert "successfully loaded checkpoint" in (tmp_path / "log.rank0").read_text()
    with pytest.raises(SystemExit):
        command.main(["--gpus", "8", "--resume", "--", *flags])
    assert "one rank cannot load what others should have saved" in capsys.readouterr().err


@needs_cuda_build
def test_context_parallelism_is_refused_without_transformer_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--gpus", "8", "--", *REMOE_182M.command(), "--context-parallel-size", "2"]) == 1
    assert "Context parallelism is only supported by TEDotProductAttention" in capsys.readouterr().out


@needs_cuda_build
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"
)
@pytest.mark.parametrize("routing", ["remoe", "moe", "dense"])
def test_transformer_engine(routing: str) -> None:
    found = Launch(routing, ONE_MICRO_BATCH).rehearse()
    assert found["starts"], found["error"]
    assert found["launches"]["forward_layer"] < 100


@needs_cuda_build
def test_what_does_not_fit_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*REMOE_182M.command(), "--micro-batch-size", "128", "--global-batch-size", "1024"]
    assert command.main(["--gpus", "8", "--gpu", "a100", "--", *flags]) == 1
    output = capsys.readouterr().out
    assert "THE TRAINING DOES NOT START" in output and "out of memory" in output
    assert "take a smaller micro-batch, more expert (EP)" in output


@needs_cuda_build
def test_data_that_are_missing_have_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command.main(
            ["--gpus", "8", "--", *Launch("dense", ONE_MICRO_BATCH).command(), "--data-path", "1.0", "nowhere/a"]
        )
        == 1
    )
    assert "pretrain_gpt.py: error: --data-path nowhere/a: there is no nowhere/a.idx" in capsys.readouterr().out


@needs_cuda_build
def test_what_is_refused_has_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*REMOE_182M.command(), "--moe-expert-capacity-factor", "1.0"]
    assert command.main(["--gpus", "8", "--", *flags]) == 1
    assert "--moe-expert-capacity-factor 1.0 cannot be used with --moe-relu-routing" in capsys.readouterr().out


@needs_cuda_build
def test_a_rehearsal_is_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*Launch("dense", ONE_MICRO_BATCH).command(), "--save", str(tmp_path / "run"), "--save-interval", "1"]
    assert command.main(["--gpus", "8", "--log", str(tmp_path / "log"), "--", *flags]) == 0
    printed = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    assert all(line.startswith("rehearsal:") for line in printed.err.splitlines())
    assert "Nothing was trained, and no GPU was used" in printed.out
    assert (tmp_path / "log.rank0").stat().st_size and build.libraries()[0].exists()
    assert (REPOSITORY / "tools" / "rehearse" / "cuda" / "stub.h").exists()
