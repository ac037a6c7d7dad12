"""Measure a training step: ReMoE at its target sparsity, top-k, and top-k in Megatron's own local layers.

--variants adds the dense start, in which half of the experts are active: by default, without the activation limit, and
with at most four experts per token; and layers with three times the target's experts per token.

Each run is a new process, and the variants take turns. Values are medians over all steps of a variant. The table also
has the memory of a step: the most that PyTorch holds beyond weights, gradients and optimizer state.

With BENCHMARK_RECORD=FILE this file is the training entry of such a run: it takes Megatron's flags, and writes FILE.
BENCHMARK_LOAD=N: experts have an even load, and ReMoE N·k experts per token. BENCHMARK_SHARE=S: also write the memory
that remoe cost forecasts for a share S of active (token, expert) pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.remoe import pretrain  # noqa: E402
from megatron.remoe.files.indexed import IndexedWriter  # noqa: E402
from tools.console.markdown import table  # noqa: E402
from tools.recipes.hardware import PLAIN_PYTORCH  # noqa: E402
from tools.recipes.models import Routing, Size  # noqa: E402

SHAPES = {"(8, 1)": (8, 1), "(8, 8)": (8, 8), "(64, 1)": (64, 1)}  # E and G: E·G experts of size FFN / G, G active
# A GPT of the paper's kind, with few layers.
SIZE = Size(2, 768, 12, 2048, init_std=0.02, vocabulary_multiple=128)
MICRO_BATCH, DOCUMENTS = 4, 64
VOCABULARY = 8191  # so that the output layer's share of the FLOPs (29 %) is near the 182M model's (24 %)
COMMON = f"""
--micro-batch-size {MICRO_BATCH} --global-batch-size {MICRO_BATCH} --vocab-size {VOCABULARY}
--tokenizer-type NullTokenizer --lr 1e-7 --lr-decay-style constant --clip-grad 1.0 --split 100,0,0 --eval-iters 0
--eval-interval 1000 --log-interval 1 --num-workers 0
""".split()
GPU_FLAGS = [*PLAIN_PYTORCH, *"--bf16 --no-gradient-accumulation-fusion --no-rope-fusion --log-interval 1000".split()]
# Micro-batches from which a router's levels are computed, as the tokens of a sequence are similar; a later step.
LEVELED, PROFILED_STEP = 4, 5


def on_gpu(words: Sequence[str] = ()) -> bool:
    """Return whether a training run with these flags runs on a GPU; the program decides by the same rule."""
    return torch.cuda.is_available() and "--cpu" not in words


WARM_UP = LEVELED + (10 if on_gpu() else 2)  # a GPU's memory pool and clock settle; a CPU profiles the memory


@dataclass(frozen=True)
class Variant:
    """A way to train: "remoe" or "moe", flags besides the shape's, and experts per token over k (0: unchanged)."""

    name: str
    routing: str
    flags: tuple[str, ...] = ()
    load: float = 1


NO_LIMIT = ("--moe-relu-activation-limit", "0")
ALL = (
    Variant("ReMoE", "remoe"),
    Variant("top-k", "moe"),
    Variant("top-k, Megatron's layers", "moe", ("--no-local-layer-fusion",)),
    Variant("dense start", "remoe", load=0),
    Variant("dense start, no limit", "remoe", NO_LIMIT, load=0),
    Variant("dense start, four experts", "remoe", ("--moe-relu-max-experts", "4"), load=0),
    Variant("three times the target", "remoe", load=3),
    Variant("three times the target, no limit", "remoe", NO_LIMIT, load=3),
)
VARIANTS = {variant.name: variant for variant in ALL}
USUAL = [*VARIANTS][:3]


class LeveledRouting:
    """Replace a router's `routing`: subtract from each expert's logits the level that a share of the tokens exceeds."""

    def __init__(self, router: Any, share: float) -> None:
        self.routing, self.share = router.routing, share
        self.levels: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if len(self.levels) < LEVELED:
            tokens_TE = logits.detach().float().flatten(0, -2)
            rank = min(len(tokens_TE), 1 + round((1 - self.share) * len(tokens_TE)))
            self.levels.append(tokens_TE.kthvalue(rank, dim=0).values)
            self.level = torch.stack(self.levels).mean(dim=0).to(logits.dtype)
        return self.routing(logits - self.level, *rest, **options)


class Recorder:
    """Measures the time between the ends of two steps' backward passes, and the peak memory of one step."""

    def __init__(self) -> None:
        self.on_gpu = on_gpu(sys.argv)
        self.record: dict[str, Any] = {"steps": [], "host": [], "active": [], "held_bytes": 0}
        self.profiler = torch.profiler.profile(profile_memory=True)  # of one step, on a CPU
        self.last: tuple[float, float] | None = None
        self.count = 0

    def install(self, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook into the model's chunks. Megatron is imported here, when the program has adapted it to the machine."""
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.transformer.moe.router import TopKRouter
        from megatron.core.utils import get_model_config
        from megatron.remoe.routing.router import ReLURouter
        from megatron.training import get_args
        from tools.plan.rank_entry import describe_model

        config, args = get_model_config(chunks[0]), get_args()
        finalize = config.finalize_model_grads_func or finalize_model_grads
        modules = [module for chunk in chunks for module in chunk.modules()]
        self.record["tokens"] = args.global_batch_size * args.seq_length
        if share := os.environ.get("BENCHMARK_SHARE"):
            self.record["forecast"] = describe_model(chunks, args, {"now": float(share) * (args.num_experts or 0)})
        if load := os.environ.get("BENCHMARK_LOAD"):
            for router in (module for module in modules if isinstance(module, TopKRouter)):
                router.routing = LeveledRouting(router, float(load) * router.topk / router.num_experts)
        routers = [module for module in modules if isinstance(module, ReLURouter)]
        chunks[0].register_forward_pre_hook(self._before_forward)

        def finalize_and_record(*arguments: Any, **options: Any) -> None:
            if counts := [router.counts for router in routers]:
                # Keep a tensor: reading its number would make ReMoE's steps, but no others, wait for the device.
                pairs = sum(count.active - count["left_out"] for count in counts)
                self.record["active"].append(pairs / sum(count["tokens"] for count in counts))
            finalize(*arguments, **options)
            self._end_step()

        config.finalize_model_grads_func = finalize_and_record
        return chunks

    def _before_forward(self, module: torch.nn.Module, _inputs: Any) -> None:
        """Begin to measure memory before a step's first forward pass, to exclude the previous step's optimizer."""
        if self.count != PROFILED_STEP or "peak_bytes" in self.record:
            return
        self.record["peak_bytes"] = 0
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.record["held_bytes"] = torch.cuda.memory_allocated()
        else:
            self.profiler.start()

    def _end_step(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            for name, end, start in zip(("steps", "host"), now, self.last, strict=True):
                self.record[name].append(end - start)
        self.last = now
        self.count += 1
        if self.count == PROFILED_STEP + 1:
            if self.on_gpu:
                self.record["peak_bytes"] = torch.cuda.max_memory_allocated() - self.record["held_bytes"]
            else:
                self.profiler.stop()
                self.record["peak_bytes"] = find_peak(self.profiler)


def find_peak(profiler: torch.profiler.profile) -> int:
    """Return the peak of PyTorch's host memory in bytes, above the memory held at the start."""
    held = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    # `profiler.events()` adds what is allocated within an operation to the operation's sum.
    events: list[Any] = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def run(shape: str, variant: Variant, steps: int, more: list[str]) -> dict[str, Any]:
    """Train for some steps on random tokens, and return the record. Exit with the end of the output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        prefix, record = Path(folder) / "tokens", Path(folder) / "record.json"
        length = MICRO_BATCH * SIZE.sequence
        tokens = numpy.random.default_rng(1).integers(0, VOCABULARY, DOCUMENTS * length).astype(numpy.uint16)
        with IndexedWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
            writer.add(tokens, numpy.full(DOCUMENTS, length))
            writer.finish()
            writer.publish()
        experts = Routing(variant.routing, *SHAPES[shape]).flags(SIZE.ffn)
        command = [sys.executable, __file__, "--num-layers", str(SIZE.layers), *SIZE.flags(), *COMMON, *experts]
        command += [*GPU_FLAGS * on_gpu(more), "--data-path", str(prefix), "--train-iters", str(steps)]
        environment = os.environ | {"BENCHMARK_RECORD": str(record), "BENCHMARK_LOAD": str(variant.load or "")}
        result = subprocess.run([*command, *variant.flags, *more], capture_output=True, text=True, env=environment)
        if result.returncode:
            raise SystemExit(f"{shape} {variant.name} failed:\n" + (result.stdout + result.stderr)[-3000:])
        return json.loads(record.read_text())


def measure(shape: str, variants: list[Variant], rounds: int, steps: int, more: list[str]) -> list[list[str]]:
    """Return a row of the table for each variant. The variants' runs take turns."""
    records: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants[:: 1 if number % 2 == 0 else -1]:
            records[variant.name].append(run(shape, variant, WARM_UP + steps + 1, more))
            seconds = statistics.median(records[variant.name][-1]["steps"][WARM_UP:])
            print(time.strftime("%X"), shape, number + 1, variant.name, f"{seconds:.4g} s", file=sys.stderr, flush=True)
    rows, first, granularity = [], None, SHAPES[shape][1]
    for name, runs in records.items():
        seconds = statistics.median(seconds for record in runs for seconds in record["steps"][WARM_UP:])
        pairs = [active for record in runs for active in record["active"][WARM_UP + 1 :]]
        experts = statistics.mean(pairs or [granularity]) / granularity
        first, peak = first or seconds, max(record["peak_bytes"] for record in runs) / 2**20
        speed = [f"{seconds:.3g}", f"{runs[0]['tokens'] / seconds:,.0f}", f"{seconds / first:.3g}"]
        rows.append([name, *speed, f"{experts:.3g}", f"{peak:,.0f}"])
    return rows


def main() -> None:
    """Measure and print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=USUAL, metavar="NAME",
                        help=f"{'; '.join(VARIANTS)} (default: the first {len(USUAL)})")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run (default 6)")
    parser.add_argument("more", nargs="*", help="more of Megatron's flags, after --")
    options = parser.parse_args()
    columns = ["variant", "s/step", "tokens/s", f"s/step over {options.variants[0]}", "full-size experts/token", "MiB"]
    for shape in options.shapes:
        given = [VARIANTS[name] for name in options.variants]
        rows = measure(shape, given, options.rounds, options.steps, options.more)
        print(f"(E, G) = {shape}\n", *table(columns, rows, text=1), "", sep="\n", flush=True)


if __name__ == "__main__":
    if path := os.environ.get("BENCHMARK_RECORD"):
        recorder = Recorder()
        pretrain.main(lambda model_cfg: model_cfg.post_wrap_hooks.append(recorder.install))
        Path(path).write_text(json.dumps(recorder.record, default=float))
    else:
        main()
