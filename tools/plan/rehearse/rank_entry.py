"""Run the training entry as one rank of many, on simulated GPUs; `command` starts it.

python rank_entry.py OPTIONS <Megatron flags>, where OPTIONS is JSON: see `command.simulate`. It writes each step's
figures to the file OPTIONS["record"].
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from megatron.remoe import pretrain  # noqa: E402
from tools.console.files import write_json  # noqa: E402
from tools.plan.rehearse import counters, fake_ranks  # noqa: E402
from tools.plan.rehearse.engine import Calls  # noqa: E402
from tools.plan.rehearse.forecast import GIB, forecast  # noqa: E402
from tools.plan.rehearse.host_reads import Pairs  # noqa: E402
from tools.plan.rehearse.roofline import Roofline, host_seconds, step_seconds  # noqa: E402


class Rehearsal:
    """Simulates steps; each measures one thing."""

    def __init__(self, options: dict[str, Any], collectives: counters.Collectives) -> None:
        self.options, self.collectives = options, collectives
        self.launches, self.waits, self.frames = counters.Launches(), counters.Waits(), counters.Frames()
        self.roofline: Roofline | None = None
        self.counted_at = self.late_waits = 0
        self.marks: list[tuple[int, int]] = []  # see `host_seconds`
        self.pairs, self.engine = Pairs(0.0), Calls()
        self.record: dict[str, Any] = {"stages": {}, "model": {}}
        self.model: list[torch.nn.Module] = []
        self.steps = 0

    def observe(self, model_cfg: Any) -> None:
        """Hook into the training; the entry calls this with Megatron imported."""
        from megatron.training import get_args, training

        get_args().do_train = True  # a stage without data would hear it from the first rank
        self.engine.watch()
        if self.options["data"]:
            self._check_data()
        self._watch_parts()
        self.pairs.put_in()
        model_cfg.post_wrap_hooks.append(self._keep)
        train_step = training.train_step

        def step(*arguments: Any, **options: Any) -> Any:
            plan = self.options["steps"][self.steps]
            self.steps += 1
            return self._step(plan, lambda: train_step(*arguments, **options))

        training.train_step = step

    def _keep(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        self.model = chunks
        return chunks

    def _check_data(self) -> None:
        """Check the data as the entry would; the training itself uses made-up tokens."""
        from megatron.remoe.start.data import check_data
        from megatron.remoe.start.messages import usage_errors
        from megatron.training import get_args
        from megatron.training.utils import get_blend_and_blend_per_split

        args = argparse.Namespace(**vars(get_args()) | {"mock_data": False, "data_path": self.options["data"]})
        with usage_errors(rank=0):
            check_data(args, get_blend_and_blend_per_split)

    def _watch_parts(self) -> None:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.transformer.attention import SelfAttention
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.moe.experts import TEGroupedMLP
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.transformer_layer import TransformerLayer
        from megatron.remoe.layer import layer
        from megatron.remoe.layer.experts import GroupedExperts
        from megatron.remoe.routing.controller import SparsityController

        for owner, method, part in (
            (schedules, "forward_step", "forward"),
            (schedules, "backward_step", "backward"),
            (SelfAttention, "forward", "attention"),
            (MoELayer, "route", "router"),
            (layer, "count_pairs", "count"),
            (GroupedExperts, "forward", "experts"),
            (TEGroupedMLP, "forward", "experts"),
            (SparsityController, "update", "update"),
        ):
            self.launches.watch(owner, method, part)
        # HybridModel has attention and MLP in layers of their own.
        self.launches.watch(
            TransformerLayer, "forward", "layer", lambda layer: isinstance(layer.self_attention, IdentityOp)
        )

    def _step(self, plan: dict[str, str], run: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        self.pairs.share = self.options["shares"].get(plan["stage"], 0.0)
        torch.cuda.reset_peak_memory_stats()
        start = time.monotonic()
        if plan["for"] == "events":
            result = self._count_events(run)
        elif plan["for"] == "roofline":
            filled = 1.0
            if args.cuda_graph_impl == "full_iteration" and args.moe_relu_max_experts:
                filled = self.pairs.share * args.num_experts / args.moe_relu_max_experts
            self.roofline = roofline = Roofline(args, self.options["rates"], self.engine, filled)
            with roofline, counters.Waits().watching(roofline.wait):
                result = run()
            self.roofline = None
            busy = host_seconds(self.marks, self.options["rates"])
            seconds = step_seconds(busy, roofline.stretches, roofline.left)
            self.record["host"] |= {"seconds": sum(busy), "step_seconds": seconds}
            self.record["roofline"] = {name: vars(work) for name, work in roofline.parts.items()}
            self.record["guessed"] = sorted(roofline.guessed)
        else:
            result = run()
            if plan["for"] == "memory":
                self.record["stages"][plan["stage"]] = {
                    "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
                    "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
                }
        if not self.record["model"]:
            sequences = args.global_batch_size / args.world_size
            model = forecast(self.model, args, self.options["shares"])
            self.record["model"] = model | {"sequences_per_gpu": sequences}
        stage = f", {plan['stage']}" if len(self.options["shares"]) > 1 else ""
        line = f"rehearsal: rank {self.options['rank']} of {self.options['world']}, step {self.steps} of "
        line += f"{len(self.options['steps'])} ({plan['for']}{stage}): {time.monotonic() - start:.1f} s, "
        print(f"{line}{torch.cuda.max_memory_allocated() / GIB:.2f} GiB", file=sys.stderr, flush=True)
        write_json(Path(self.options["record"]), self.record)
        return result

    def _count_events(self, run: Any) -> Any:
        self.collectives.is_counting = True
        with self.launches.counting(), self.waits.watching(self._mark), self.frames.counting():
            self._mark()
            result = run()
            self._mark()
        self.collectives.is_counting = False
        self.record |= {"launches": self.launches.step, "parts": self.launches.found, "late_waits": self.late_waits}
        self.record["host"] = {"calls": self.frames.count, "stretches": len(self.marks) - 1}
        waits = self.waits.found.most_common()
        self.record["host_syncs"] = [{"where": where, "times": times} for where, times in waits]
        names = ("kind", "group", "ranks", "within_node")
        self.record["collectives"] = [
            dict(zip(names, call, strict=True)) | {"times": len(sizes), "bytes": sum(sizes)}
            for call, sizes in self.collectives.found.items()
        ]
        return result

    def _mark(self) -> None:
        self.marks.append((self.frames.count, self.launches.so_far()))


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
