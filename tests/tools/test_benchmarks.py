"""The benchmarks, with models so small that their figures say nothing: they run, and keep what they measured."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tools.benchmarking import module
from tests.trainings import REPOSITORY
from tools.recipes.hardware import gpu_flags

SMALL = """
-- --hidden-size 48 --ffn-hidden-size 64 --moe-ffn-hidden-size 64 --seq-length 64 --max-position-embeddings 64
--micro-batch-size 2 --global-batch-size 2
""".split()


def benchmark(name: str, output: Path, *arguments: str, expect: int = 0, on_gpu: bool = False) -> str:
    """Run one without a terminal, on the CPU unless told otherwise; returns what it printed."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), "--output", str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    environment |= {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_step_compares_with_plain_pytorch(tmp_path: Path) -> None:
    variants = ["ReMoE", "top-k, Megatron's layers, plain PyTorch"]
    arguments = ["--shapes", "(8, 8)", "--variants", *variants, "--rounds", "1", "--steps", "2", *SMALL]
    printed = benchmark("step", tmp_path / "step.json", *arguments)
    assert "(8, 8) round 1/1 ReMoE: " in printed and "2/2" in printed
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["machine"]["cores"] == os.cpu_count() and "step.py" in record["command"]
    figures = record["results"]["(8, 8)"]
    assert list(figures) == variants
    assert all(len(found["all_seconds"]) == 2 and found["peak_flops"] > 1e9 for found in figures.values())
    # Routers were brought to the target, which is one expert of full size, and top-k has no λ.
    assert 0.7 < figures["ReMoE"]["active_experts_of_full_size"] < 1.5
    assert figures["ReMoE"]["update_seconds"] > 0 == figures[variants[1]]["update_seconds"]


def test_memory_tells_dense_from_target(tmp_path: Path) -> None:
    printed = benchmark("memory", tmp_path / "memory.json", "--experts", "16", *SMALL)
    assert "16 experts, dense stage, unbounded: " in printed
    steady, dense, unbounded = json.loads((tmp_path / "memory.json").read_text())["results"]["16"].values()
    assert steady["active"][-1] < 2 < 6 < dense["active"][-1]
    assert 0 < dense["peak_bytes"] < unbounded["peak_bytes"]


def test_layer_has_all_peers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = "--tokens 32 64 --experts 4 --hidden 32 --ffn 16 --repetitions 1".split()
    printed = benchmark("layer", tmp_path / "layer.json", *sizes)
    assert "4 experts, 64 tokens: ReMoE, grouped" in printed
    seconds = json.loads((tmp_path / "layer.json").read_text())["seconds"]
    assert list(seconds) == ["4 experts, 32 tokens", "4 experts, 64 tokens"]
    peers = ["ReMoE, grouped", "Megatron's, top-k", "transformers, eager", "transformers, grouped_mm"]
    assert all(list(times) == peers and min(min(found) for found in times.values()) > 0 for times in seconds.values())


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    printed = benchmark("bounded", tmp_path / "bounded.json", "--shapes", "(8,1)", expect=2)
    assert "invalid choice: '(8,1)'" in printed


def test_a_step_in_half_precision_stays_at_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The optimizer sets half-precision weights from its own, and took the first version's routers back to the start.
    more = [*SMALL, *module("models", monkeypatch).GPU_FLAGS]
    arguments = ["--shapes", "(8, 8)", "--variants", "ReMoE", "--rounds", "1", "--steps", "2"]
    benchmark("step", tmp_path / "step.json", *arguments, *more)
    figures = json.loads((tmp_path / "step.json").read_text())["results"]["(8, 8)"]["ReMoE"]
    assert 0.7 < figures["active_experts_of_full_size"] < 1.5


def test_layer_in_half_precision(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = "--bf16 --tokens 64 --experts 4 --hidden 32 --ffn 16 --repetitions 1 --transformers eager".split()
    assert "4 experts, 64 tokens: ReMoE, grouped" in benchmark("layer", tmp_path / "layer.json", *sizes)


def test_a_gpu_gets_the_launch_scripts_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    models, step = module("models", monkeypatch), module("step", monkeypatch)
    script = " ".join(gpu_flags(True, "", [], "")[0])
    wanted = re.findall(r"--bf16|--transformer-impl(?= local)|--no-[a-z-]+", script)
    assert set(wanted) == {word for word in models.GPU_FLAGS if word.startswith("--")} - {"--log-interval"}
    assert models.GPU_FLAGS[models.GPU_FLAGS.index("--transformer-impl") + 1] == "local"

    commands = []

    def pretend(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        Path(env["BENCHMARK_RECORD"]).write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(step.subprocess, "run", pretend)
    for available, more in ((True, ["--lr", "1"]), (False, []), (True, ["--cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        step.run(models.Shape(8, 1), step.STOCK, 1, more)
    assert [set(wanted) <= set(command) for command in commands] == [True, False, False]
    assert ["--bf16" in command for command in commands] == [True, False, False]
    assert commands[0][-2:] == ["--lr", "1"]  # the user's win


@pytest.mark.parametrize("name", ["scaling", "memory", "bounded", "operations"])
def test_all_train_in_one_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module(name, monkeypatch).run is module("step", monkeypatch).run


def test_plain_pytorch_is_measured_once_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    step = module("step", monkeypatch)
    assert step.chosen_variants(None, []) == step.VARIANTS or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step.chosen_variants(None, []) == [step.REMOE, step.TOPK, step.STOCK]
    assert step.chosen_variants([step.PLAIN.name], ["--cpu"]) == [step.PLAIN]
    with pytest.raises(ValueError, match="for a CPU"):
        step.chosen_variants([step.PLAIN.name], [])
    assert step.WARM_UP % 2 == 0, "bounded.py takes every second step from there"


def test_adams_kernels_on_a_gpu_are_adams(monkeypatch: pytest.MonkeyPatch) -> None:
    kind_of = module("operations", monkeypatch).kind_of
    assert kind_of("aten::_foreach_lerp_") == kind_of("aten::_fused_adamw_") == "Adam"


def test_a_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_peers = module("gpu_peers", monkeypatch)

    class Peer(torch.nn.Module):
        def __init__(self, experts: int, hidden: int, *_: int) -> None:
            super().__init__()
            self.router_weight = torch.nn.Parameter(torch.empty(experts, hidden))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens @ self.router_weight.T

    class Broken(Peer):
        def forward(self, _tokens: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_peers, "PEERS", {"broken": Broken, "whole": Peer})
    weight, tokens = torch.randn(4, 8).bfloat16(), torch.randn(3, 1, 8).bfloat16()
    found = gpu_peers.gpu_peers(4, 8, 8, 2, weight, tokens)
    assert list(found) == ["whole"] and torch.equal(found["whole"].router_weight, weight)
    assert "broken: not measured, no kernel image" in capsys.readouterr().err


def test_transformers_may_be_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    layer = module("layer", monkeypatch)
    monkeypatch.setitem(sys.modules, "transformers.models.mixtral", None)
    block = partial(layer.mixtral_block, "eager", 4, SimpleNamespace(), torch.empty(4, 8))
    assert layer.usable("transformers, eager", block, torch.empty(1)) == {}
    assert "transformers, eager: not measured, " in capsys.readouterr().err


def test_rich_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = module("results", monkeypatch)
    monkeypatch.setattr(results, "Console", None)
    with results.progress(2) as done:
        done("(8, 1): 3 s")
    results.show("A step", ["variant", "s/step"], [("ReMoE", 0.12345)], tmp_path / "step.json")
    printed = capsys.readouterr()
    assert printed.err == "(8, 1): 3 s\n"
    assert printed.out == f"A step\nvariant\ts/step\nReMoE\t0.123\nFigures: {tmp_path / 'step.json'}\n"


def test_kernels_need_a_gpu(tmp_path: Path) -> None:
    assert "there is no GPU" in benchmark("kernels", tmp_path / "kernels.json", expect=2)


def test_figures_name_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = module("results", monkeypatch)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.65'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    results.gpus.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpus" not in results.machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert results.machine()["gpus"] == ["NVIDIA H100, 580.65"]
    results.gpus.cache_clear()


def test_a_short_time_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = module("results", monkeypatch).milliseconds
    assert [milliseconds(seconds) for seconds in (2.618, 0.12, 0.00123)] == ["2,618 ms", "120 ms", "1.23 ms"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: runs the benchmarks on it")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("step", ["--shapes", "(8, 8)", "--rounds", "1", "--steps", "4"]),
        ("bounded", ["--shapes", "(8, 1)", "--pairs", "4"]),
        ("memory", ["--experts", "16"]),
        ("operations", ["--shapes", "(8, 1)"]),
        ("layer", ["--bf16", "--tokens", "1024", "--experts", "8", "--repetitions", "2"]),
        ("kernels", ["--tokens", "1024", "--repetitions", "2"]),
    ],
)
def test_on_a_gpu(name: str, arguments: list[str], tmp_path: Path) -> None:
    if name == "layer":
        pytest.importorskip("transformers")
    benchmark(name, tmp_path / "figures.json", *arguments, on_gpu=True)
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["machine"]["gpus"]
    if name == "step":
        figures = record["results"]["(8, 8)"]
        assert list(figures) == ["ReMoE", "top-k", "top-k, Megatron's layers"]
        assert all(0 < found["utilization"] < 1 for found in figures.values())
        assert 0.7 < figures["ReMoE"]["active_experts_of_full_size"] < 1.5
