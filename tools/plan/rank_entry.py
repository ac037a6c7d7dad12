"""Run the training entry as one rank of many, on simulated GPUs; `rehearse.simulate` starts it.

python -m tools.plan.rank_entry OPTIONS <Megatron flags>: OPTIONS is JSON, and figures go to the file OPTIONS["record"].
"""

import argparse
import collections
import ctypes
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megatron.remoe import pretrain

from ..console.files import write_json
from ..recipes.flops import flops_per_sequence
from . import fake_ranks
from .phases import experts_by_phase
from .roofline import EngineCalls, Roofline

GIB = 2**30
# Functions of torch.distributed: position and name of the argument whose bytes a rank handles.
COLLECTIVES = {
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "all_to_all_single": (1, "input"),
    "isend": (0, "tensor"),
    "irecv": (0, "tensor"),
}


def choose_steps(phases: dict[str, float]) -> list[tuple[str, str]]:
    """Return the steps to simulate, as phase and purpose.

    The first step warms up, one in each phase measures memory, one counts events, and one the operations' work.
    """
    first, last = next(iter(phases)), next(reversed(phases))
    return [(first, "warm-up"), *((phase, "memory") for phase in phases), (last, "events"), (last, "roofline")]


class Collectives:
    """Count calls of torch.distributed by kind and group: how many "times", and the "bytes" that a rank handles."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], dict[str, Any]] = {}  # by kind and group
        self.is_counting = False

    def watch(self, gpus_per_node: int) -> None:
        """Wrap the functions. Call this before anything imports them by name; they count while `is_counting`."""
        for name in COLLECTIVES:
            watched = self._watched(getattr(torch.distributed, name), name, gpus_per_node)
            setattr(torch.distributed, name, watched)
            setattr(torch.distributed.distributed_c10d, name, watched)

    def _watched(self, real: Callable[..., Any], kind: str, gpus_per_node: int) -> Callable[..., Any]:
        position, keyword = COLLECTIVES[kind]

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            tensor = arguments[position] if len(arguments) > position else options.get(keyword)
            if self.is_counting and torch.is_tensor(tensor) and tensor.is_cuda:
                groups = [value for value in arguments if isinstance(value, torch.distributed.ProcessGroup)]
                group = next(iter(groups), options.get("group")) or torch.distributed.group.WORLD
                assert group is not None
                ranks = torch.distributed.get_process_group_ranks(group)
                within = len({rank // gpus_per_node for rank in ranks}) == 1
                name = group.group_desc.removesuffix("_GROUP").lower().replace("_", " ")
                new = {"kind": kind, "group": name, "ranks": len(ranks), "within_node": within, "times": 0, "bytes": 0}
                call = self.calls.setdefault((kind, name), new)
                call["times"], call["bytes"] = call["times"] + 1, call["bytes"] + tensor.nbytes
            return real(*arguments, **options)

        return watched


@contextmanager
def counting_frames() -> Iterator[collections.Counter[str]]:
    """Count the calls of Python functions inside the block, in all threads; yield a counter with "calls"."""
    monitoring, counter = sys.monitoring, collections.Counter[str]()
    tool, event = monitoring.PROFILER_ID, monitoring.events.PY_START

    def started(_code: Any, _offset: int) -> None:
        counter["calls"] += 1

    monitoring.use_tool_id(tool, "rehearsal")
    monitoring.register_callback(tool, event, started)
    monitoring.set_events(tool, event)
    try:
        yield counter
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)


@contextmanager
def watching_waits() -> Iterator[collections.Counter[str]]:
    """Count the host's waits for the device inside the block by place, from PyTorch's sync-debug warnings."""
    show, places = warnings.showwarning, collections.Counter[str]()

    def take(message: Any, *arguments: Any, **options: Any) -> None:
        if "called a synchronizing" in str(message):  # the mode itself warns once, with other words
            places[_place()] += 1
        else:
            show(message, *arguments, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = take
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """Return file and line of the two innermost frames that belong to Megatron or this project."""
    here, folder = os.path.dirname(__file__), f"{os.sep}megatron{os.sep}"
    frame: FrameType | None = sys._getframe(1)
    named: list[str] = []
    while frame is not None and len(named) < 2:
        file = frame.f_code.co_filename
        if folder in file and not file.startswith(here):
            named.append(f"megatron/{file.rsplit('megatron' + os.sep, 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(named) or "outside of Megatron"


class Rehearsal:
    """Simulate steps. Each step measures one thing."""

    def __init__(self, options: dict[str, Any], collectives: Collectives) -> None:
        self.options, self.collectives = options, collectives
        self.pairs, self.engine = fake_ranks.FakePairCounts(0.0), EngineCalls()
        self.args: argparse.Namespace  # Megatron's, from `observe` on
        self.record: dict[str, Any] = {"stages": {}, "model": {}}
        self.phases: dict[str, float] = {}
        self.schedule: list[tuple[str, str]] = []
        self.steps = 0

    def observe(self, model_cfg: Any) -> None:
        """Hook into the training loop. The training entry calls this after it has imported Megatron."""
        from megatron.training import get_args, training

        args = self.args = get_args()
        args.do_train = True  # in a real run, the first rank sends this to stages without data
        self.phases = experts_by_phase(args)
        if wanted := self.options["stage"]:
            self.phases = {wanted: self.phases[wanted]}
        self.schedule = choose_steps(self.phases)
        args.train_iters = len(self.schedule)
        self.engine.watch()
        self.pairs.install()
        train_step = training.train_step

        def step(function: Any, data: Any, model: list[torch.nn.Module], *arguments: Any, **options: Any) -> Any:
            phase, purpose = self.schedule[self.steps]
            self.steps += 1
            result = self._step(phase, purpose, lambda: train_step(function, data, model, *arguments, **options))
            self.record["model"] = describe_model(model, args, self.phases)
            write_json(Path(self.options["record"]), self.record)
            return result

        training.train_step = step

    def _step(self, phase: str, purpose: str, run: Any) -> Any:
        experts = self.args.num_experts
        self.pairs.share = self.phases[phase] / experts if experts else 0.0
        torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        measure = {"events": self._count_events, "roofline": self._count_work}.get(purpose, lambda run: run())
        result = measure(run)
        if purpose == "memory":
            self.record["stages"][phase] = {
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }
        line = (
            f"rehearsal: rank {self.options['rank']}, step {self.steps} of {len(self.schedule)} ({phase}, {purpose}): "
        )
        print(f"{line}{time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        return result

    def _count_events(self, run: Any) -> Any:
        launches = ctypes.CDLL("libcuda.so.1").rehearsal_launches  # preloaded
        before, self.collectives.is_counting = launches(), True
        with watching_waits() as waits, counting_frames() as frames:
            result = run()
        self.collectives.is_counting = False
        self.record |= {"launches": launches() - before, "calls": frames["calls"], "host_syncs": dict(waits)}
        self.record["collectives"] = [*self.collectives.calls.values()]
        return result

    def _count_work(self, run: Any) -> Any:
        roofline = Roofline(self.args, self.options["rates"], self.engine)
        with roofline:
            result = run()
        self.record["roofline"] = roofline.parts
        return result


def describe_model(chunks: list[torch.nn.Module], args: argparse.Namespace, phases: dict[str, float]) -> dict[str, Any]:
    """Return the forecast of the rank's memory, its FLOPs, and the pipeline's bubble.

    Args:
        chunks: the rank's part of the model.
        args: Megatron's validated arguments.
        phases: from `experts_by_phase`.

    Returns:
        "forecast_gib": GiB by phase; "step_flops": the model's FLOPs per GPU and step; "bubble": the pipeline's
        slowdown (m v + p - 1) / (m v) with m micro-batches, v virtual stages per rank and p ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from . import memory, parameters

    steps = get_num_microbatches() * (args.virtual_pipeline_model_parallel_size or 1)
    stages = [parameters.count(chunks)] * args.pipeline_model_parallel_size
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {
        "forecast_gib": {
            phase: sum(memory.stage_memory(args, stages, stage, experts)) / GIB for phase, experts in phases.items()
        },
        "step_flops": flops_per_sequence(args) * args.global_batch_size / args.world_size,
        "bubble": (steps + args.pipeline_model_parallel_size - 1) / steps,
    }


def main() -> None:
    """Simulate the rank."""
    options = json.loads(sys.argv[1])
    sys.argv = ["pretrain_gpt.py", *sys.argv[2:]]
    torch.backends.cudnn.enabled = False  # the no-op CUDA does not have this library
    torch.backends.cuda.enable_cudnn_sdp(False)
    collectives = Collectives()
    collectives.watch(options["gpus_per_node"])
    fake_ranks.join(options["rank"], options["world"], options["gpus_per_node"])
    pretrain.main(Rehearsal(options, collectives).observe)


if __name__ == "__main__":
    main()
