"""Run the training entry and measure its steps; the figures go to the JSON file $BENCHMARK_RECORD.

BENCHMARK_LOAD=N: routers start with an even load for the first batches, ReMoE's with N·k experts per token.
BENCHMARK_SHARE=S: also record the memory that remoe cost forecasts for a share S of active (token, expert) pairs.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.remoe import pretrain  # noqa: E402

if TYPE_CHECKING:
    from megatron.core.transformer.moe.router import TopKRouter

# Steps that bring routers to the target. One batch is not enough, because the tokens of a sequence are similar.
FIT_STEPS = 4
PROFILED_STEP = FIT_STEPS + 1
PEAK_SIZES = {
    "cpu": ((2048, 2048, 2048), (4096, 768, 2048), (4096, 2048, 768)),
    "cuda": ((8192, 8192, 8192), (4096, 4096, 4096), (4096, 768, 8192)),
}


def on_gpu(words: Sequence[str] = ()) -> bool:
    """Return whether a training run with these flags runs on a GPU; the entry decides by the same rule."""
    return torch.cuda.is_available() and "--cpu" not in words


def matmul_peak(dtype: torch.dtype, device: str) -> float:
    """Return the machine's measured FLOP/s of `torch.mm`: the best of some sizes and repetitions."""
    best = 0.0
    for rows, inner, columns in PEAK_SIZES[device]:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        seconds = min(time_call(partial(torch.mm, left, right), device) for _ in range(5))
        best = max(best, 2.0 * rows * inner * columns / seconds)
    return best


def time_call(operation: Callable[[], object], device: str) -> float:
    """Return the seconds of a warm call; on a GPU, the mean of 20 calls."""
    timer = Timer("operation()", globals={"operation": operation}, num_threads=torch.get_num_threads())
    return timer.timeit(20 if device == "cuda" else 1).mean


@torch.no_grad()
def fit_router(router: "TopKRouter", hidden: torch.Tensor, share: float) -> None:
    """Lower each expert's weights along the mean token until a share of the tokens has a positive logit.

    Computed in fp32: half precision has no quantiles.

    Args:
        hidden: the router's input, `[..., hidden]`.
        share: of the tokens; k/E at the target.
    """
    tokens, weight = hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float()
    mean = tokens.mean(dim=0)
    direction = mean / mean.square().sum()
    along = tokens @ direction
    thresholds = (tokens @ weight.T / along.unsqueeze(1)).quantile(1 - share, dim=0)
    router.weight -= torch.outer(thresholds, direction)


class Recorder:
    """Measures the time between the ends of two steps' backward passes, and the peak memory of one step.

    Its methods import Megatron, which the entry has adapted to the machine by then.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.record: dict[str, Any] = {"steps": [], "host": [], "active": []}
        self.profiler: torch.profiler.profile  # of one step, on a CPU
        self.last: tuple[float, float] | None = None
        self.held = self.count = 0
        self.measures_memory = False

    def observe(self, model_cfg: Any) -> None:
        """Measure the run of the model with this configuration."""
        model_cfg.post_wrap_hooks.append(self.install)

    def install(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook into the model's chunks."""
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.utils import get_model_config
        from megatron.remoe.routing.router import ReLURouter
        from megatron.training import get_args
        from tools.plan.rank_entry import describe_model
        from tools.recipes.flops import Flops

        config = get_model_config(chunks[0])
        finalize = config.finalize_model_grads_func or finalize_model_grads
        modules = [module for chunk in chunks for module in chunk.modules()]
        args = get_args()
        batch, flops = args.global_batch_size, Flops.count(vars(args))
        self.record["model"] = {
            "layers": args.num_layers,
            "tokens": batch * args.seq_length,
            "topk": args.moe_router_topk,
            "flops": batch * flops.sequence,  # of a step with k experts per token
            "flops_per_expert": batch * flops.expert,  # of a step, for one more expert per token
        }
        if share := os.environ.get("BENCHMARK_SHARE"):
            self.record["forecast"] = describe_model(chunks, args, {"now": float(share) * (args.num_experts or 0)})
        if load := os.environ.get("BENCHMARK_LOAD"):
            give_tokens_a_mean(chunks)
            for router in (module for module in modules if isinstance(module, TopKRouter)):
                router.register_forward_pre_hook(Fit(router, float(load) * router.topk / router.num_experts))
        chunks[0].register_forward_pre_hook(lambda *_: self._before_forward())

        def finalize_and_record(*arguments: Any, **options: Any) -> None:
            routers = [module for module in modules if isinstance(module, ReLURouter)]
            if counts := [router.counts for router in routers]:
                # Keep a tensor: reading its number would make ReMoE's steps, but no others, wait for the device.
                pairs = sum(count.active - count["left_out"] for count in counts)
                self.record["active"].append(pairs / sum(count["tokens"] for count in counts))
            finalize(*arguments, **options)
            self._end_of_step()

        config.finalize_model_grads_func = finalize_and_record
        return chunks

    def write(self, peak_flops: float) -> None:
        """Write the record, with the machine's matmul rate."""
        active = [float(active) for active in self.record["active"]]
        self.record |= {"held_bytes": self.held, "active": active, "peak_flops": peak_flops}
        Path(os.environ["BENCHMARK_RECORD"]).write_text(json.dumps(self.record))

    def _before_forward(self) -> None:
        """Begin to measure memory before a step's first forward pass, to exclude the previous step's optimizer."""
        if self.count != PROFILED_STEP or self.measures_memory:
            return
        self.measures_memory = True
        if not self.on_gpu:
            self.profiler = torch.profiler.profile(profile_memory=True)
            self.profiler.start()
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()

    def _end_of_step(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            self.record["steps"].append(now[0] - self.last[0])
            self.record["host"].append(now[1] - self.last[1])
        self.last = now
        self.count += 1
        if self.count != PROFILED_STEP + 1:
            return
        if self.on_gpu:
            self.record["peak_bytes"] = torch.cuda.max_memory_allocated() - self.held
        else:
            self.profiler.stop()
            self.record["peak_bytes"] = find_peak(self.profiler)


@torch.no_grad()
def give_tokens_a_mean(chunks: list[torch.nn.Module]) -> None:
    """Add one vector to all embeddings: routers reach the target along it."""
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if name.endswith("word_embeddings.weight"):
                weight.add_(3 * weight.std() * torch.randn(weight.shape[1], device=weight.device).sign())


class Fit:
    """Keeps a router's share of active pairs in the first steps, over all tokens seen so far."""

    def __init__(self, router: "TopKRouter", share: float) -> None:
        self.share = share
        self.initial = router.weight.detach().clone()
        self.tokens: list[torch.Tensor] = []
        self.left = FIT_STEPS

    def __call__(self, router: "TopKRouter", arguments: tuple[torch.Tensor, ...]) -> None:
        if self.left:
            self.left -= 1
            self.tokens.append(arguments[0].detach().reshape(-1, arguments[0].shape[-1]))
            router.weight.data.copy_(self.initial)
            fit_router(router, torch.cat(self.tokens), self.share)
            main = getattr(router.weight, "main_param", None)
            if main is not None:  # in half precision, the optimizer sets the weights from its fp32 copy
                main.data.view(-1).copy_(router.weight.data.view(-1))
        else:
            self.tokens.clear()  # else they would count as memory of later steps


def find_peak(profiler: torch.profiler.profile) -> int:
    """Return the peak of PyTorch's host memory in bytes, above the memory held at the start."""
    held = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # `profiler.events()` adds what is allocated within an operation to the operation's sum.
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if event.device_type() == DeviceType.CPU]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    recorder = Recorder(on_gpu(sys.argv))
    pretrain.main(recorder.observe)
    dtype = torch.bfloat16 if "--bf16" in sys.argv else torch.float32
    recorder.write(matmul_peak(dtype, "cuda" if recorder.on_gpu else "cpu"))
