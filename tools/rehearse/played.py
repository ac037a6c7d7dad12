"""The training entry as one rank of many, on GPUs that are not there; `command` starts it.

python played.py OPTIONS <Megatron flags>, where OPTIONS is JSON: see `command.play`. Writes what it measures to the
file OPTIONS["record"] after each step.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

import pretrain_gpt  # noqa: E402
from tools.rehearse import measure, world  # noqa: E402
from tools.rehearse.engine import Calls  # noqa: E402
from tools.rehearse.roofline import Roofline  # noqa: E402
from tools.rehearse.values import Pairs  # noqa: E402

GIB = 2**30


class Rehearsal:
    """Plays steps, each for what is to be measured in it."""

    def __init__(self, options: dict[str, Any], collectives: measure.Collectives) -> None:
        self.options, self.collectives = options, collectives
        self.events, self.waits = measure.Events(), measure.Waits()
        self.parts = measure.Parts(self.events)
        self.pairs, self.engine = Pairs(0.0), Calls()
        self.record: dict[str, Any] = {"stages": {}, "model": {}}
        self.model: list[torch.nn.Module] = []
        self.steps = 0

    def observe(self, model_cfg: Any) -> None:
        """As the entry calls it, with Megatron imported."""
        from megatron.training import get_args, training

        get_args().do_train = True  # which a stage without data would hear from the first rank
        self.engine.watch()
        self._look_at_data()
        self._watch_parts()
        self.pairs.put_in()
        model_cfg.post_wrap_hooks.append(self._keep)
        train_step = training.train_step

        def step(*arguments: Any, **options: Any) -> Any:
            plan = self.options["steps"][self.steps]
            self.steps += 1
            return self._step(plan, lambda: train_step(*arguments, **options))

        training.train_step = step

    def _look_at_data(self) -> None:
        """As the entry does before a training, which here takes made-up tokens instead."""
        from megatron.remoe.preflight.data import check_data
        from megatron.remoe.preflight.messages import usage_errors
        from megatron.training import get_args
        from megatron.training.utils import get_blend_and_blend_per_split

        if self.options["data"]:
            args = argparse.Namespace(**vars(get_args()) | {"mock_data": False, "data_path": self.options["data"]})
            with usage_errors(rank=0):
                check_data(args, get_blend_and_blend_per_split)

    def _keep(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        self.model = chunks
        return chunks

    def _watch_parts(self) -> None:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.transformer.attention import SelfAttention
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.moe.experts import TEGroupedMLP
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.transformer_layer import TransformerLayer
        from megatron.remoe.local.experts import GroupedExperts
        from megatron.remoe.moe import layer
        from megatron.remoe.moe.engine_experts import EngineExperts
        from megatron.remoe.routing.controller import SparsityController

        for owner, method, name in (
            (schedules, "forward_step", "forward"),
            (schedules, "backward_step", "backward"),
            (SelfAttention, "forward", "attention"),
            (MoELayer, "route", "router"),
            (layer.ReMoELayer, "_count", "count"),
            (layer, "plan_dispatch", "plan"),
            (GroupedExperts, "forward", "experts"),
            (TEGroupedMLP, "forward", "experts"),
            (EngineExperts, "forward", "experts"),
            (SparsityController, "update", "update"),
        ):
            self.parts.watch(owner, method, name)
        # HybridModel has attention and MLP in layers of their own.
        self.parts.watch(
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
            with Roofline(args, self.options["rates"], self.engine) as roofline:
                result = run()
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
            self.record["model"] = self._model(args)
        stage = f", {plan['stage']}" if len(self.options["shares"]) > 1 else ""
        print(
            f"rehearsal: rank {self.options['rank']} of {self.options['world']}, step {self.steps} of "
            f"{len(self.options['steps'])} ({plan['for']}{stage}): {time.monotonic() - start:.1f} s, "
            f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )
        self._write()
        return result

    def _count_events(self, run: Any) -> Any:
        self.collectives.is_counting = True
        try:
            with self.events.counting(), self.waits.watching():
                result = run()
                self.record["counts"] = self.events.counts()
        finally:
            self.collectives.is_counting = False
        self.record["parts"] = self.parts.found
        self.record["host_syncs"] = [
            {"where": where, "times": times} for where, times in self.waits.found.most_common()
        ]
        self.record["collectives"] = [
            {
                "kind": kind,
                "group": group,
                "ranks": ranks,
                "within_node": within,
                "times": len(sizes),
                "bytes": sum(sizes),
            }
            for (kind, group, ranks, within), sizes in self.collectives.found.items()
        ]
        return result

    def _model(self, args: Any) -> dict[str, Any]:
        """What the forecast of memory goes by."""
        from megatron.core import parallel_state

        experts = shared = 0
        for name, parameter in (item for chunk in self.model for item in chunk.named_parameters()):
            is_expert = ".mlp.experts." in name
            experts, shared = experts + parameter.numel() * is_expert, shared + parameter.numel() * (not is_expert)
        layers: list[Any] = [
            module.layer_number
            for chunk in self.model
            for module in chunk.modules()
            if hasattr(module, "layer_number") and hasattr(module, "self_attention")
        ]
        stage = parallel_state.get_pipeline_model_parallel_rank()
        per_token = {name: share * (args.num_experts or 0) for name, share in self.options["shares"].items()}
        return {"shared": shared, "experts": experts, "layers": layers, "stage": stage} | {
            "forecast_gib": {
                name: _forecast(args, shared, experts, layers, stage, value) for name, value in per_token.items()
            },
            "flops_per_sequence": _flops(args),
            "sequences_per_gpu": args.global_batch_size / args.world_size,
        }

    def _write(self) -> None:
        path = Path(self.options["record"])
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(self.record))
        os.replace(aside, path)


def _forecast(args: Any, shared: int, experts: int, layers: list[int], stage: int, per_token: float) -> float:
    """What tools/cost says of this rank's memory, in GiB."""
    from tools.cost import memory
    from tools.cost.parameters import Stage

    stages = [Stage(shared, experts, tuple(layers))] * args.pipeline_model_parallel_size
    return memory.stage_memory(args, stages, stage, per_token).total / GIB


def _flops(args: Any) -> float:
    from tools.recipes import flops

    return flops.flops_per_sequence(args)


def main() -> None:
    """Play the rank."""
    options = json.loads(sys.argv[1])
    sys.argv = ["pretrain_gpt.py", *sys.argv[2:]]
    torch.backends.cudnn.enabled = False  # the one library that is not stood in for
    torch.backends.cuda.enable_cudnn_sdp(False)
    collectives = measure.Collectives()
    collectives.watch(options["gpus_per_node"])
    world.join(options["rank"], options["world"], options["gpus_per_node"])
    pretrain_gpt.main(Rehearsal(options, collectives).observe)


if __name__ == "__main__":
    main()
