"""The training entry that also measures its steps: a JSON file at $BENCHMARK_RECORD.

With BENCHMARK_AT_TARGET=1 the routers start with the same share of the first batches for every expert, those of a ReMoE
at the target sparsity. With BENCHMARK_LIMIT_IN_TURNS=1 every second step goes without the bound on activations. With
BENCHMARK_PROFILE=memory or =operations a step's memory or its operations' time are measured instead, which makes it
slow; with =waits, on a GPU, the memory of each step besides and in some of them where the host waits for the device.
With BENCHMARK_PLAIN_PYTORCH=1 a CPU does without oneDNN's products, Adam and clipping in one pass, norms in parts
and the memory that is kept.

On a GPU the clock is read when the device has done what it was given.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if os.environ.get("BENCHMARK_PLAIN_PYTORCH"):
    from megatron.remoe.cpu import engine, facade

    engine.use_onednn = engine.sum_in_chunks = lambda: None  # type: ignore[assignment, return-value]
    engine._keep_freed_memory = engine._scale_in_place = lambda: None
    facade._optim = lambda: torch.optim

from models import FIT_STEPS, WATCHED_STEPS, on_gpu  # noqa: E402

import pretrain_gpt  # noqa: E402
from tools.rehearse.measure import Waits  # noqa: E402

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.remoe.moe.layer import ReMoELayer
    from megatron.remoe.routing.controller import SparsityController

PROFILED_STEP = FIT_STEPS + 1
MODEL_PRODUCTS = ((4096, 768, 2048), (4096, 2048, 768))
PEAK_SIZES = ((2048, 2048, 2048), *MODEL_PRODUCTS)
# A GPU does the CPU's largest in the time that it takes to start one; the third is the output layer's.
GPU_PEAK_SIZES = ((8192, 8192, 8192), (4096, 4096, 4096), (4096, 768, 8192), *MODEL_PRODUCTS)
GPU_REPETITIONS = 20


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """The machine's measured FLOP/s of `torch.mm`: the best of some sizes and repetitions."""
    best = 0.0
    for rows, inner, columns in PEAK_SIZES if device == "cpu" else GPU_PEAK_SIZES:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        for _ in range(5):
            if device == "cpu":
                start = time.perf_counter()
                torch.mm(left, right)
                seconds = time.perf_counter() - start
            else:
                seconds = seconds_on_gpu(partial(torch.mm, left, right))
            best = max(best, 2.0 * rows * inner * columns / seconds)
    return best


def seconds_on_gpu(operation: Callable[[], object]) -> float:
    """The mean by the device's clock over repetitions that it does one after another, warm."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(GPU_REPETITIONS):
        operation()
    start.record()
    for _ in range(GPU_REPETITIONS):
        operation()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / GPU_REPETITIONS


@torch.no_grad()
def start_at_target(router: "TopKRouter", hidden: torch.Tensor) -> None:
    """Lower each expert's weights along the mean token until k/E of the tokens have a positive logit.

    Computed in fp32: half precision has no quantiles.

    Args:
        hidden: what the router sees, `[..., hidden]`.
    """
    tokens, weight = hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float()
    mean = tokens.mean(dim=0)
    direction = mean / mean.square().sum()
    along = tokens @ direction
    thresholds = (tokens @ weight.T / along.unsqueeze(1)).quantile(1 - router.topk / router.num_experts, dim=0)
    router.weight -= torch.outer(thresholds, direction)


class Recorder:
    """Measures from the end of one step's backward passes to that of the next.

    Its methods import Megatron, which the entry has adapted to the machine by then.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.record: dict[str, Any] = {"steps": [], "updates": [], "active": []}
        self.last: float | None = None
        self.profiler: torch.profiler.profile | None = None
        self.held: int | None = None
        self.count = 0
        self.limits: dict[ReMoELayer, float] = {}

    def install(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """As a hook of Megatron's, on the model's chunks."""
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.utils import get_model_config
        from megatron.remoe.moe.layer import ReMoELayer
        from megatron.remoe.routing.router import ReLURouter

        config = get_model_config(chunks[0])
        finalize = config.finalize_model_grads_func or finalize_model_grads
        modules = [module for chunk in chunks for module in chunk.modules()]
        routers = [module for module in modules if isinstance(module, ReLURouter)]
        if os.environ.get("BENCHMARK_LIMIT_IN_TURNS"):
            self.limits = {module: module.pairs_limit for module in modules if isinstance(module, ReMoELayer)}
        if os.environ.get("BENCHMARK_AT_TARGET"):
            self._start_at_target(chunks, [module for module in modules if isinstance(module, TopKRouter)])
        if self.on_gpu and os.environ.get("BENCHMARK_PROFILE") == "memory":
            chunks[0].register_forward_pre_hook(lambda *_: self._before_forward())

        def finalize_and_record(*arguments: Any, **options: Any) -> None:
            if counts := [router.counts for router in routers if router.counts is not None]:
                # A tensor: a number would be waited for, in ReMoE's steps alone.
                pairs = sum(of_router.active for of_router in counts)
                self.record["active"].append(pairs / sum(of_router["tokens"] for of_router in counts))
            finalize(*arguments, **options)
            self._end_of_step()

        config.finalize_model_grads_func = finalize_and_record
        return chunks

    def observe(self, model_cfg: Any) -> None:
        """Measure the training of the model that has this configuration."""
        self.time_updates()
        if os.environ.get("BENCHMARK_PROFILE") == "waits":
            self.watch_waits()
        model_cfg.post_wrap_hooks.append(self.install)

    def write(self) -> None:
        """Put the record where the caller reads it."""
        self.record["active"] = [float(active) for active in self.record["active"]]
        Path(os.environ["BENCHMARK_RECORD"]).write_text(json.dumps(self.record))

    def time_updates(self) -> None:
        """Let every controller's update add to the record.

        On a GPU those before the steps that are measured, since waiting before and after would slow these.
        """
        from megatron.remoe.routing.controller import SparsityController

        update = SparsityController.update

        def timed(controller: "SparsityController") -> None:
            if self.on_gpu and self.count > FIT_STEPS:
                update(controller)
                return
            self._wait()
            start = time.perf_counter()
            update(controller)
            self._wait()
            self.record["updates"].append(time.perf_counter() - start)

        SparsityController.update = timed  # type: ignore[method-assign, assignment]

    def watch_waits(self) -> None:
        """Let some steps, which that makes slow, add the places at which the host waits for the device."""
        from megatron.training import training

        train_step = training.train_step

        def watched(*arguments: Any, **options: Any) -> Any:
            if not PROFILED_STEP <= self.count < PROFILED_STEP + WATCHED_STEPS:
                return train_step(*arguments, **options)
            waits = Waits()
            with waits.watching():
                result = train_step(*arguments, **options)
            self.record.setdefault("host_syncs", []).append(waits.found)
            return result

        training.train_step = watched

    def _wait(self) -> None:
        """For the device, to do all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _before_forward(self) -> None:
        """Let the device's peak begin anew with the profiled step, behind the optimizer's of the one before."""
        if self.count == PROFILED_STEP and self.held is None:
            self._wait()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()

    def _end_of_step(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self.last is not None:
            self.record["steps"].append(now - self.last)
        self.last = now
        self.count += 1
        for layer, limit in self.limits.items():
            layer.pairs_limit = limit if self.count % 2 else 0.0
        wanted = os.environ.get("BENCHMARK_PROFILE")
        if wanted == "waits":
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.record.setdefault("peaks", []).append(peaks)
            torch.cuda.reset_peak_memory_stats()
        elif wanted == "memory" and self.on_gpu:
            if self.count == PROFILED_STEP + 1:
                assert self.held is not None
                self.record["peak_bytes"] = torch.cuda.max_memory_allocated() - self.held
        elif wanted and self.count == PROFILED_STEP:
            self.profiler = torch.profiler.profile(profile_memory=wanted == "memory")
            self.profiler.__enter__()
        elif wanted and self.count == PROFILED_STEP + 1:
            assert self.profiler is not None
            self.profiler.__exit__(None, None, None)
            if wanted == "memory":
                self.record["peak_bytes"] = peak_of(self.profiler)
            else:
                self.record["operations"] = seconds_of_operations(self.profiler.key_averages(), self.on_gpu)

    def _start_at_target(self, chunks: list[torch.nn.Module], routers: list["TopKRouter"]) -> None:
        with torch.no_grad():
            for chunk in chunks:
                for name, weight in chunk.named_parameters():
                    if name.endswith("word_embeddings.weight"):  # gives all tokens something in common
                        weight.add_(3 * weight.std() * torch.randn(weight.shape[1], device=weight.device).sign())
        for router in routers:
            router.register_forward_pre_hook(_Fit(router))


class _Fit:
    """Keeps a router at the target over all tokens that it has seen so far, for the first steps."""

    def __init__(self, router: "TopKRouter") -> None:
        self.initial = router.weight.detach().clone()
        self.tokens: list[torch.Tensor] = []
        self.left = FIT_STEPS

    def __call__(self, router: "TopKRouter", arguments: tuple[torch.Tensor, ...]) -> None:
        if self.left:
            self.left -= 1
            self.tokens.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]))
            router.weight.data.copy_(self.initial)
            start_at_target(router, torch.cat(self.tokens))
            main = getattr(router.weight, "main_param", None)
            if main is not None:  # with half precision the optimizer sets the weights from its own, in fp32
                main.data.view(-1).copy_(router.weight.data.view(-1))
        else:
            self.tokens.clear()  # which would count as memory of the steps to come


def seconds_of_operations(events: Sequence[Any], on_gpu: bool) -> dict[str, float]:
    """Operation → seconds on the device that computes, those of the operations it calls not counted.

    Args:
        events: a profile's `key_averages()`. On a GPU the time of a kernel is in two of them, its own and that of the
            operation which started it.
        on_gpu: whether the GPU's time is meant.
    """
    if not on_gpu:
        return {event.key: event.self_cpu_time_total / 1e6 for event in events}
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    seconds = {event.key: event.self_device_time_total / 1e6 for event in on_host if event.self_device_time_total}
    total = sum(event.self_device_time_total for event in kernels) / 1e6
    return seconds | {"kernels of no operation": max(0.0, total - sum(seconds.values()))}


def peak_of(profiler: torch.profiler.profile) -> int:
    """The most bytes of the host's memory that PyTorch held above what it held at the beginning."""
    held = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # `profiler.events()` puts what is allocated within an operation into the operation's sum.
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if event.device_type() == DeviceType.CPU]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    recorder = Recorder(on_gpu(sys.argv))
    pretrain_gpt.main(recorder.observe)
    dtype = torch.bfloat16 if "--bf16" in sys.argv else torch.float32
    recorder.record["peak_flops"] = matmul_peak(dtype, "cuda" if recorder.on_gpu else "cpu")
    recorder.record["median_update"] = statistics.median(recorder.record["updates"] or [0.0])
    recorder.write()
