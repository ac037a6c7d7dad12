"""The training entry that also measures its steps: a JSON file at $BENCHMARK_RECORD.

With BENCHMARK_AT_TARGET=1 the routers start with the same share of the first batches for every expert, those of a ReMoE
at the target sparsity. With BENCHMARK_LIMIT_IN_TURNS=1 every second step goes without the bound on activations. With
BENCHMARK_PROFILE=memory or =operations a step's memory or its operations' time are measured instead, which makes it
slow. With BENCHMARK_PLAIN_PYTORCH=1 a CPU does without oneDNN's products, Adam and clipping in one pass, norms in parts
and the memory that is kept.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if os.environ.get("BENCHMARK_PLAIN_PYTORCH"):
    from megatron.remoe.cpu import engine, facade

    engine.use_onednn = engine.sum_in_chunks = lambda: None  # type: ignore[attr-defined, assignment, return-value]
    engine._keep_freed_memory = engine._scale_in_place = lambda: None
    facade._optim = lambda: torch.optim  # type: ignore[assignment, return-value]

from models import FIT_STEPS  # noqa: E402

import pretrain_gpt  # noqa: E402

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.remoe.moe.layer import ReMoELayer
    from megatron.remoe.routing.controller import SparsityController

PROFILED_STEP = FIT_STEPS + 1
PEAK_SIZES = ((2048, 2048, 2048), (4096, 768, 2048), (4096, 2048, 768))


def matmul_peak(dtype: torch.dtype) -> float:
    """The machine's measured FLOP/s of `torch.mm`: the best of some sizes and repetitions."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = 0.0
    for rows, inner, columns in PEAK_SIZES:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - start))
    return best


@torch.no_grad()
def start_at_target(router: "TopKRouter", hidden: torch.Tensor) -> None:
    """Lower each expert's weights along the mean token until k/E of the tokens have a positive logit.

    Args:
        hidden: what the router sees, `[..., hidden]`.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    mean = tokens.mean(dim=0)
    direction = mean / mean.square().sum()
    along = tokens @ direction
    thresholds = (tokens @ router.weight.T / along.unsqueeze(1)).quantile(1 - router.topk / router.num_experts, dim=0)
    router.weight -= torch.outer(thresholds, direction)


class Recorder:
    """Measures from the end of one step's backward passes to that of the next.

    Its methods import Megatron, which the entry has adapted to the machine by then.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"steps": [], "updates": [], "active": []}
        self.last: float | None = None
        self.profiler: torch.profiler.profile | None = None
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

        def finalize_and_record(*arguments: Any, **options: Any) -> None:
            if routers:
                pairs = sum(float(router.counts.active) for router in routers)
                tokens = sum(float(router.counts["tokens"]) for router in routers)
                self.record["active"].append(pairs / tokens)
            finalize(*arguments, **options)
            self._end_of_step()

        config.finalize_model_grads_func = finalize_and_record
        return chunks

    def observe(self, model_cfg: Any) -> None:
        """Measure the training of the model that has this configuration."""
        self.time_updates()
        model_cfg.post_wrap_hooks.append(self.install)

    def write(self) -> None:
        """Put the record where the caller reads it."""
        Path(os.environ["BENCHMARK_RECORD"]).write_text(json.dumps(self.record))

    def time_updates(self) -> None:
        """Let every controller's update add to the record."""
        from megatron.remoe.routing.controller import SparsityController

        update = SparsityController.update

        def timed(controller: "SparsityController") -> None:
            start = time.perf_counter()
            update(controller)
            self.record["updates"].append(time.perf_counter() - start)

        SparsityController.update = timed  # type: ignore[method-assign]

    def _end_of_step(self) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.record["steps"].append(now - self.last)
        self.last = now
        self.count += 1
        for layer, limit in self.limits.items():
            layer.pairs_limit = limit if self.count % 2 else 0.0
        wanted = os.environ.get("BENCHMARK_PROFILE")
        if wanted and self.count == PROFILED_STEP:
            self.profiler = torch.profiler.profile(profile_memory=wanted == "memory")
            self.profiler.__enter__()
        elif wanted and self.count == PROFILED_STEP + 1:
            assert self.profiler is not None
            self.profiler.__exit__(None, None, None)
            if wanted == "memory":
                self.record["peak_bytes"] = peak_of(self.profiler)
            else:
                self.record["operations"] = seconds_of_operations(self.profiler)

    def _start_at_target(self, chunks: list[torch.nn.Module], routers: list["TopKRouter"]) -> None:
        with torch.no_grad():
            for chunk in chunks:
                for name, weight in chunk.named_parameters():
                    if name.endswith("word_embeddings.weight"):  # gives all tokens something in common
                        weight += 3 * weight.std() * torch.randn(weight.shape[1], device=weight.device).sign()
        for router in routers:
            router.register_forward_pre_hook(_Fit(router))


class _Fit:
    """Keeps a router at the target over all tokens that it has seen so far, for the first steps."""

    def __init__(self, router: "TopKRouter") -> None:
        self.initial = router.weight.detach().clone()
        self.tokens: list[torch.Tensor] = []

    def __call__(self, router: "TopKRouter", arguments: tuple[torch.Tensor, ...]) -> None:
        if len(self.tokens) < FIT_STEPS:
            self.tokens.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]))
            router.weight.data.copy_(self.initial)
            start_at_target(router, torch.cat(self.tokens))


def seconds_of_operations(profiler: torch.profiler.profile) -> dict[str, float]:
    """Operation → seconds on the device that computes, those of the operations it calls not counted."""
    time_of = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return {event.key: getattr(event, time_of) / 1e6 for event in profiler.key_averages()}


def peak_of(profiler: torch.profiler.profile) -> int:
    """The most bytes that PyTorch held above what it held at the beginning."""
    held = peak = 0
    # `profiler.events()` puts what is allocated within an operation into the operation's sum.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    recorder = Recorder()
    pretrain_gpt.main(recorder.observe)
    recorder.record["peak_flops"] = matmul_peak(torch.bfloat16 if "--bf16" in sys.argv else torch.float32)
    recorder.record["median_update"] = statistics.median(recorder.record["updates"] or [0.0])
    recorder.write()
