"""The benchmarks, with models so small that their figures say nothing: they run, and keep what they measured.

What they do on a GPU is tested as far as a CPU can tell, with a torch.cuda that only notes what it is asked.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from tests.trainings import REPOSITORY

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


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of benchmarks/ in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def timed_entry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("timed_entry", monkeypatch)


@pytest.fixture
def calls(timed_entry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the training entry did with the clock and the GPU, in order."""
    found: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("wait"))
    clock = SimpleNamespace(perf_counter=lambda: float(found.append("clock") or len(found)))
    monkeypatch.setattr(timed_entry, "time", clock)
    return found


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


def half_precision_router() -> tuple[Any, torch.Tensor]:
    """A router with eight experts of which two are wanted, and tokens that have much in common."""
    torch.manual_seed(1)
    tokens = torch.randn(4096, 1, 256) + torch.randn(256).sign()
    weight = torch.nn.Parameter((0.02 * torch.randn(8, 256)).bfloat16())
    return SimpleNamespace(weight=weight, topk=2, num_experts=8), tokens.bfloat16()


def shares(router: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of the tokens that each expert gets."""
    return (tokens.flatten(0, 1) @ router.weight.T > 0).float().mean(dim=0)


def test_half_precision_routers_start_at_the_target(timed_entry: ModuleType) -> None:
    router, tokens = half_precision_router()
    timed_entry.start_at_target(router, tokens)
    torch.testing.assert_close(shares(router, tokens), torch.full((8,), 0.25), atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(8, 256), (-1,)], ids=["whole", "flat"])
def test_the_optimizers_weights_are_at_the_target_too(timed_entry: ModuleType, shape: tuple[int, ...]) -> None:
    router, tokens = half_precision_router()
    router.weight.main_param = router.weight.detach().float().view(shape)
    timed_entry._Fit(router)(router, (tokens,))
    router.weight.data.copy_(router.weight.main_param.view(8, 256))  # as at the end of a step
    torch.testing.assert_close(shares(router, tokens), torch.full((8,), 0.25), atol=0.02, rtol=0)


def test_a_gpu_gets_the_launch_scripts_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    models, step = module("models", monkeypatch), module("step", monkeypatch)
    script = (REPOSITORY / "scripts" / "lib" / "gpus.sh").read_text()
    wanted = re.findall(r"--bf16|--transformer-impl(?= local)|--no-[a-z-]+", script[script.index("set_hardware") :])
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


def test_what_a_router_was_fitted_to_is_let_go(timed_entry: ModuleType) -> None:
    router, tokens = half_precision_router()
    fit = timed_entry._Fit(router)
    for _ in range(timed_entry.FIT_STEPS):
        fit(router, (tokens,))
    kept = router.weight.clone()
    fit(router, (tokens,))
    assert fit.tokens == [] and torch.equal(router.weight, kept)


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


def test_a_gpus_matmul_rate_is_by_its_clock(timed_entry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, _end: "Event") -> float:
            return 40.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    number = timed_entry.GPU_REPETITIONS
    seconds = timed_entry.seconds_on_gpu(lambda: log.append("product"))
    assert seconds == pytest.approx(0.040 / number)
    assert log == ["product"] * number + ["event"] + ["product"] * number + ["event", "wait"]
    rate = timed_entry.matmul_peak(torch.bfloat16, "meta")
    assert rate == pytest.approx(2 * 8192**3 / seconds)
    assert set(timed_entry.MODEL_PRODUCTS) < set(timed_entry.GPU_PEAK_SIZES)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_step_ends_when_the_device_is_done(timed_entry: ModuleType, calls: list[str], on_gpu: bool) -> None:
    timed_entry.Recorder(on_gpu)._end_of_step()
    assert calls == (["wait", "clock"] if on_gpu else ["clock"])


@pytest.mark.parametrize("on_gpu", [True, False])
def test_an_update_is_timed_on_the_device(
    timed_entry: ModuleType, calls: list[str], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.remoe.routing.controller import SparsityController

    monkeypatch.setattr(SparsityController, "update", lambda _: calls.append("update"))
    recorder = timed_entry.Recorder(on_gpu)
    recorder.time_updates()
    timed = ["wait", "clock", "update", "wait", "clock"] if on_gpu else ["clock", "update", "clock"]
    controller: Any = None
    SparsityController.update(controller)
    assert calls == timed and len(recorder.record["updates"]) == 1
    calls.clear()
    recorder.count = timed_entry.FIT_STEPS + 1  # from here on steps are measured, which must not wait
    SparsityController.update(controller)
    assert calls == (["update"] if on_gpu else timed)


def pretended_model() -> torch.nn.Module:
    """What hooks of Megatron's are installed on."""
    chunk = torch.nn.Linear(2, 2)
    chunk.config = SimpleNamespace(finalize_model_grads_func=lambda *_, **__: None)
    return chunk


def test_a_gpus_peak_is_that_of_one_steps_passes(timed_entry: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    held, peak = 100, 0

    def reset() -> None:
        nonlocal peak
        peak = held

    monkeypatch.setenv("BENCHMARK_PROFILE", "memory")
    for name, function in {
        "synchronize": lambda: None,
        "reset_peak_memory_stats": reset,
        "memory_allocated": lambda: held,
        "max_memory_allocated": lambda: peak,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    recorder, chunk = timed_entry.Recorder(True), pretended_model()
    recorder.install([chunk])
    for step in range(timed_entry.PROFILED_STEP + 2):
        chunk(torch.zeros(1, 2))
        peak = max(peak, 350 if step == timed_entry.PROFILED_STEP else 900)
        chunk.config.finalize_model_grads_func([chunk])
        peak = max(peak, 1000)  # the optimizer's step
    assert recorder.record["peak_bytes"] == 250 and recorder.profiler is None


def test_counting_pairs_does_not_wait(timed_entry: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.remoe.routing.counts import COLUMNS, RoutingCounts
    from megatron.remoe.routing.router import ReLURouter

    router, chunk = ReLURouter.__new__(ReLURouter), pretended_model()
    torch.nn.Module.__init__(router)
    chunk.router = router
    recorder = timed_entry.Recorder(False)
    recorder.install([chunk])
    # Tensors without values tell whether one is read.
    for device in ("meta", "cpu"):
        router.counts = RoutingCounts(torch.full((8 + len(COLUMNS),), 2.0, dtype=torch.float64, device=device))
        chunk.config.finalize_model_grads_func([chunk])
    without, _ = recorder.record["active"]
    assert without.device.type == "meta"
    recorder.record["active"] = recorder.record["active"][1:]
    monkeypatch.setenv("BENCHMARK_RECORD", str(tmp_path / "record.json"))
    recorder.write()
    assert json.loads((tmp_path / "record.json").read_text())["active"] == [8.0]


def event(key: str, device: DeviceType, host: int, gpu: int, is_user_annotation: bool = False) -> SimpleNamespace:
    """A line of a profile, in microseconds."""
    times = {"self_cpu_time_total": host, "self_device_time_total": gpu}
    return SimpleNamespace(key=key, device_type=device, is_user_annotation=is_user_annotation, **times)


def test_a_gpus_time_counts_once(timed_entry: ModuleType) -> None:
    events = [
        event("aten::mm", DeviceType.CPU, 30, 2_000_000),
        event("cudaLaunchKernel", DeviceType.CPU, 500, 0),
        event("gemm_kernel", DeviceType.CUDA, 0, 2_000_000),
        event("triton_kernel", DeviceType.CUDA, 0, 500_000),
        event("Optimizer.step", DeviceType.CUDA, 0, 9_000_000, is_user_annotation=True),
    ]
    assert timed_entry.seconds_of_operations(events, True) == {"aten::mm": 2.0, "kernels of no operation": 0.5}
    assert timed_entry.seconds_of_operations(events, False)["cudaLaunchKernel"] == 500e-6


def test_the_hosts_peak_is_the_hosts_alone(timed_entry: ModuleType) -> None:
    def allocation(at: int, device: DeviceType, size: int) -> SimpleNamespace:
        fields = {"name": "[memory]", "device_type": device, "nbytes": size, "start_ns": at}
        return SimpleNamespace(**{name: lambda value=value: value for name, value in fields.items()})

    found = [
        allocation(1, DeviceType.CPU, 10),
        allocation(2, DeviceType.CUDA, 1000),
        allocation(3, DeviceType.CPU, -10),
    ]
    results = SimpleNamespace(events=lambda: found)
    assert timed_entry.peak_of(SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))) == 10


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
