"""A training step of the whole model: ReMoE at its target sparsity, top-k, and top-k in Megatron's own local layers.

--variants adds the dense start, where half of the experts are active: unchanged, without a bound on memory, and with
at most four experts per token.

Each run is the training entry in a new process, in turns; each figure is the median over all steps of a variant. Also
printed: FLOPs with the true number of active experts over the machine's measured matmul rate.

With --memory, the memory of a step of a smaller model while routing is dense (half of the experts active) and at the
target: the most that PyTorch holds beyond weights, gradients and optimizer state.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from models import FIT_STEPS, GPU_FLAGS, ROOT, Shape, note, on_gpu, save, show

from megatron.remoe.files.indexed import IndexedWriter
from tools.recipes.flops import flops_per_sequence, model_arguments
from tools.recipes.models import Routing

SHAPES = {shape.name: shape for shape in (Shape(8, 1), Shape(8, 8), Shape(64, 1))}
WARM_UP = FIT_STEPS + (10 if on_gpu() else 0)  # a GPU's memory pool and clock settle too


@dataclass(frozen=True)
class Variant:
    """One way to train: "remoe" or "moe", flags on top of the shape's, and environment."""

    name: str
    routing: str
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=lambda: {"BENCHMARK_AT_TARGET": "1"})


REMOE, TOPK = Variant("ReMoE", "remoe"), Variant("top-k", "moe")
STOCK = Variant("top-k, Megatron's layers", "moe", ("--no-local-layer-fusion",))
NO_LIMIT = ("--moe-relu-activation-limit", "0")
DENSE = (
    Variant("dense start", "remoe", (), {}),
    Variant("dense start, no limit", "remoe", NO_LIMIT, {}),
    Variant("dense start, four experts", "remoe", ("--moe-relu-max-experts", "4"), {}),
)
USUAL = (REMOE, TOPK, STOCK)
VARIANTS = {variant.name: variant for variant in (*USUAL, *DENSE)}
SMALL, MEMORY = Shape(8, 1, hidden=384, ffn=768, micro_batch=2), {"BENCHMARK_MEMORY": "1"}
STAGES = (
    Variant("at the target", "remoe", (), REMOE.environment | MEMORY),
    Variant("dense stage", "remoe", (), MEMORY),
    Variant("dense stage, unbounded", "remoe", NO_LIMIT, MEMORY),
)


def write_data(prefix: Path, shape: Shape) -> None:
    """Write random tokens, enough for every step."""
    tokens = numpy.random.default_rng(1).integers(0, shape.vocabulary, 64 * shape.tokens).astype(numpy.uint16)
    with IndexedWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
        writer.add(tokens, numpy.full(64, shape.tokens))
        writer.finish()
        writer.publish()


def run(shape: Shape, variant: Variant, steps: int, more: list[str]) -> dict[str, Any]:
    """Train for some steps and return the record of benchmarks/timed_entry.py.

    Raises:
        SystemExit: the training failed; the message is the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix, record = Path(folder) / "tokens", Path(folder) / "record.json"
        write_data(prefix, shape)
        command = [sys.executable, str(ROOT / "benchmarks" / "timed_entry.py"), *shape.flags(variant.routing)]
        command += [*(GPU_FLAGS if on_gpu(more) else []), "--data-path", str(prefix), "--train-iters", str(steps)]
        environment = os.environ | variant.environment | {"BENCHMARK_RECORD": str(record)}
        result = subprocess.run([*command, *variant.flags, *more], capture_output=True, text=True, env=environment)
        if result.returncode:
            raise SystemExit(f"{shape.name} {variant.name} failed:\n" + (result.stdout + result.stderr)[-3000:])
        return json.loads(record.read_text())


def measure(shape: Shape, variants: list[Variant], rounds: int, steps: int, more: list[str]) -> dict[str, Any]:
    """Return variant's name → its figures, from runs in turns."""
    records: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants[:: 1 if number % 2 == 0 else -1]:
            records[variant.name].append(run(shape, variant, WARM_UP + steps + 1, more))
            seconds = statistics.median(records[variant.name][-1]["steps"][WARM_UP:])
            note(f"{shape.name} round {number + 1}/{rounds} {variant.name}: {seconds:.4g} s a step")
    figures, size = {}, records[variants[0].name][0]["size"]
    args = model_arguments(shape.size, Routing("moe", shape.experts, shape.granularity), shape.vocabulary + 1)
    args.num_layers, args.seq_length = size["num_layers"], size["seq_length"]
    tokens = size["global_batch_size"] * args.seq_length
    peak = max(record["peak_flops"] for runs in records.values() for record in runs)
    for name, runs in records.items():
        times = [seconds for record in runs for seconds in record["steps"][WARM_UP:]]
        pairs = [active for record in runs for active in record["active"][WARM_UP + 1 :]]
        active = statistics.mean(pairs or [shape.granularity]) / shape.granularity
        seconds = statistics.median(times)
        flops = flops_per_sequence(args, active * shape.granularity)
        figures[name] = {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "active_experts_of_full_size": active,
            "utilization": flops * tokens / args.seq_length / seconds / peak,
            "layers": args.num_layers,
            "tokens": tokens,
        }
    return figures


def measure_memory(options: argparse.Namespace) -> None:
    """Measure, print and write the memory of a step."""
    results: dict[int, dict[str, Any]] = {}
    rows = []
    for experts in options.memory:
        stages = results[experts] = {}
        for stage in STAGES:
            stages[stage.name] = run(replace(SMALL, experts=experts), stage, FIT_STEPS + 2, options.more)
            save(options.output, {"results": results})
            note(f"{experts} experts, {stage.name}: {stages[stage.name]['peak_bytes'] / 2**20:,.0f} MiB")
        peaks = [record["peak_bytes"] for record in stages.values()]
        cells = (f"{one['peak_bytes'] / 2**20:,.0f} MiB ({one['active'][-1]:.1f})" for one in stages.values())
        rows.append((experts, *cells, peaks[1] / peaks[0], peaks[2] / peaks[0]))
    columns = ["E", *(f"{stage.name} (experts/token)" for stage in STAGES), "dense / target", "unbounded / target"]
    show(f"{SMALL.layers} layers, hidden {SMALL.hidden}, {SMALL.tokens} tokens", columns, rows, options.output)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    text, usual = f"{'; '.join(VARIANTS)} (default: the first {len(USUAL)})", [variant.name for variant in USUAL]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=usual, metavar="NAME", help=text)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run (default 6)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "step.json")
    text = "measure memory, for these numbers of experts (default: 8 64 128)"
    parser.add_argument("--memory", type=int, nargs="*", metavar="E", help=text)
    parser.add_argument("more", nargs="*", help="more of Megatron's flags, after --")
    options = parser.parse_args()
    if options.memory is not None:
        options.memory = options.memory or [8, 64, 128]
        return measure_memory(options)
    variants = [VARIANTS[name] for name in options.variants]
    results: dict[str, Any] = {}
    columns = ["variant", "s/step", "tokens/s", f"s/step over {variants[0].name}", "experts/token", "of matmul rate"]
    for shape in (SHAPES[name] for name in options.shapes):
        figures = results[shape.name] = measure(shape, variants, options.rounds, options.steps, options.more)
        save(options.output, {"results": results})
        first, names = figures[variants[0].name]["seconds"], ("active_experts_of_full_size", "utilization")
        rows = [
            (name, one["seconds"], f"{one['tokens_per_second']:,.0f}", one["seconds"] / first, *map(one.get, names))
            for name, one in figures.items()
        ]
        size = "{layers} layers, {tokens} tokens".format(**figures[variants[0].name])
        show(f"(E, G) = {shape.name}, {size}", columns, rows, options.output)


if __name__ == "__main__":
    main()
