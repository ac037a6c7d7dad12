"""Run the training entry as one rank of many, on simulated GPUs; `rehearse` starts it.

python -m tools.plan.rank_entry OPTIONS <Megatron flags>, where OPTIONS is JSON: see `rehearse.simulate`. It writes each
step's figures to the file OPTIONS["record"].
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from megatron.remoe import pretrain

from ..console.files import write_json
from . import counters, fake_ranks
from .activations import experts_by_phase
from .host_reads import Pairs
from .roofline import Roofline
from .transformer_engine import Calls

GIB = 2**30


def plan_steps(phases: dict[str, float]) -> list[tuple[str, str]]:
    """Return the steps to simulate, as phase and purpose.

    One step starts, one in each phase measures memory, one counts events, and one counts the operations' work.
    """
    first, last = next(iter(phases)), next(reversed(phases))
    return [(first, "start"), *((phase, "memory") for phase in phases), (last, "events"), (last, "roofline")]


class Rehearsal:
    """Simulates steps; each measures one thing."""

    def __init__(self, options: dict[str, Any], collectives: counters.Collectives) -> None:
        self.options, self.collectives = options, collectives
        self.pairs, self.engine = Pairs(0.0), Calls()
        self.record: dict[str, Any] = {"stages": {}, "model": {}}
        self.model: list[torch.nn.Module] = []
        self.phases: dict[str, float] = {}
        self.plan: list[tuple[str, str]] = []
        self.steps = 0

    def observe(self, model_cfg: Any) -> None:
        """Hook into the training; the entry calls this with Megatron imported."""
        from megatron.training import get_args, training

        args = get_args()
        args.do_train = True  # a stage without data would hear it from the first rank
        self.phases = self._choose_phases(args)
        self.plan = plan_steps(self.phases)
        args.train_iters = len(self.plan)
        self.engine.watch()
        self.pairs.install()
        model_cfg.post_wrap_hooks.append(self._keep)
        train_step = training.train_step

        def step(*arguments: Any, **options: Any) -> Any:
            phase, purpose = self.plan[self.steps]
            self.steps += 1
            return self._step(phase, purpose, lambda: train_step(*arguments, **options))

        training.train_step = step

    def _choose_phases(self, args: argparse.Namespace) -> dict[str, float]:
        phases, wanted = experts_by_phase(args), self.options["stage"]
        if wanted is not None and wanted not in phases:
            sys.exit(f"pretrain_gpt.py: error: --stage {wanted}: this run has none; choose from {', '.join(phases)}")
        return {wanted: phases[wanted]} if wanted else phases

    def _keep(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        self.model = chunks
        return chunks

    def _step(self, phase: str, purpose: str, run: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        self.pairs.share = self.phases[phase] / args.num_experts if args.num_experts else 0.0
        torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        measure = {"events": self._count_events, "roofline": self._count_work}.get(purpose, lambda run: run())
        result = measure(run)
        if purpose == "memory":
            self.record["stages"][phase] = {
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            }
        if not self.record["model"]:
            self.record["model"] = describe_model(self.model, args, self.phases)
        named = f", {phase}" if len(self.phases) > 1 else ""
        line = f"rehearsal: rank {self.options['rank']} of {self.options['world']}, step {self.steps} of "
        line += f"{len(self.plan)} ({purpose}{named}): {time.monotonic() - start:.1f} s, "
        print(f"{line}{torch.cuda.max_memory_allocated() / GIB:.2f} GiB", file=sys.stderr, flush=True)
        write_json(Path(self.options["record"]), self.record)
        return result

    def _count_events(self, run: Any) -> Any:
        launches = ctypes.CDLL("libcuda.so.1").rehearsal_launches  # preloaded
        before, self.collectives.is_counting = launches(), True
        with counters.watching_waits() as waits, counters.counting_frames() as frames:
            result = run()
        self.collectives.is_counting = False
        self.record |= {"launches": launches() - before, "calls": frames["calls"], "host_syncs": dict(waits)}
        self.record["collectives"] = self.collectives.list_calls()
        return result

    def _count_work(self, run: Any) -> Any:
        from megatron.training import get_args

        roofline = Roofline(get_args(), self.options["rates"], self.engine)
        with roofline:
            result = run()
        self.record["roofline"] = roofline.parts
        return result


def describe_model(chunks: list[torch.nn.Module], args: argparse.Namespace, phases: dict[str, float]) -> dict[str, Any]:
    """Return the forecast of the rank's memory, its FLOPs, and the pipeline's bubble.

    Args:
        chunks: the rank's part of the model.
        args: Megatron's validated arguments.
        phases: see `experts_by_phase`.

    Returns:
        "forecast_gib" by phase; the model's FLOPs on a GPU in a step, "step_flops", None if some layers are not
        counted; "bubble", see `step_estimate.bubble`.
    """
    from megatron.core import parallel_state

    from . import memory, parameters, step_estimate

    stages = [parameters.count(chunks)] * args.pipeline_model_parallel_size
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {
        "forecast_gib": {
            phase: sum(memory.stage_memory(args, stages, stage, experts)) / GIB for phase, experts in phases.items()
        },
        "step_flops": step_estimate.step_flops(args),
        "bubble": step_estimate.bubble(args),
    }


def main() -> None:
    """Simulate the rank."""
    options = json.loads(sys.argv[1])
    sys.argv = ["pretrain_gpt.py", *sys.argv[2:]]
    torch.backends.cudnn.enabled = False  # the only library without a no-op version
    torch.backends.cuda.enable_cudnn_sdp(False)
    collectives = counters.Collectives()
    collectives.watch(options["gpus_per_node"])
    fake_ranks.join(options["rank"], options["world"], options["gpus_per_node"])
    pretrain.main(Rehearsal(options, collectives).observe)


if __name__ == "__main__":
    main()
