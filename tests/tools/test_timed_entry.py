"""How the benchmarks' training entry measures: on a GPU as far as a CPU can tell, by a torch.cuda that notes calls."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from tests.tools.benchmarking import module


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


def test_what_a_router_was_fitted_to_is_let_go(timed_entry: ModuleType) -> None:
    router, tokens = half_precision_router()
    fit = timed_entry._Fit(router)
    for _ in range(timed_entry.FIT_STEPS):
        fit(router, (tokens,))
    kept = router.weight.clone()
    fit(router, (tokens,))
    assert fit.tokens == [] and torch.equal(router.weight, kept)


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
