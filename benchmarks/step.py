"""A training step of the whole model: ReMoE at its target sparsity, top-k, and top-k in Megatron's own local layers.

On a CPU the last once more, without what this project changes in PyTorch there.

Every run is the training entry in a process of its own, in turns, and each figure the median over all steps of a
variant. Also printed: the share of the machine's measured matmul rate that the model's FLOPs make, counted with the
true number of active experts, and the time of λ's update.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from models import FIT_STEPS, Shape, hardware_flags, on_gpu
from results import progress, save, show

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.remoe.data.indexed import IndexedWriter  # noqa: E402

SHAPES = {shape.name: shape for shape in (Shape(8, 1), Shape(8, 8), Shape(64, 1))}
# Steps that are not measured: an even number, for those that take turns. A GPU's memory pool and clock settle too.
WARM_UP = FIT_STEPS + (10 if on_gpu() else 0)


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        routing: "ReMoE" or "top-k".
        flags: on top of the shape's.
        environment: on top of this process's.
    """

    name: str
    routing: str
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


BALANCED = (("BENCHMARK_AT_TARGET", "1"),)
REMOE = Variant("ReMoE", "ReMoE", (), BALANCED)
TOPK = Variant("top-k", "top-k", (), BALANCED)
STOCK = Variant("top-k, Megatron's layers", "top-k", ("--no-local-layer-fusion",), BALANCED)
PLAIN = Variant(f"{STOCK.name}, plain PyTorch", "top-k", STOCK.flags, (*BALANCED, ("BENCHMARK_PLAIN_PYTORCH", "1")))
VARIANTS = [REMOE, TOPK, STOCK, PLAIN]


def write_data(prefix: Path, shape: Shape) -> None:
    """Random tokens, enough for every step."""
    generator = numpy.random.default_rng(1)
    with IndexedWriter(prefix, numpy.dtype(numpy.uint16)) as writer:
        tokens = generator.integers(0, shape.vocabulary, 64 * shape.tokens).astype(numpy.uint16)
        writer.add(tokens, numpy.full(64, shape.tokens))
        writer.finish()
        writer.publish()


def run(shape: Shape, variant: Variant, steps: int, more: list[str]) -> dict[str, Any]:
    """Train for some steps and return the record of benchmarks/timed_entry.py.

    Raises:
        SystemExit: the training failed; the end of what it printed is the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix, record = Path(folder) / "tokens", Path(folder) / "record.json"
        write_data(prefix, shape)
        through = shlex.split(os.environ.get("BENCHMARK_THROUGH", ""))  # a program that runs the entry
        entry = [*through, str(ROOT / "benchmarks" / "timed_entry.py")]
        command = [sys.executable, *entry, *shape.flags(variant.routing)]
        command += [*hardware_flags(more), "--data-path", str(prefix), "--train-iters", str(steps)]
        command += [*variant.flags, *more]
        environment = os.environ | dict(variant.environment) | {"BENCHMARK_RECORD": str(record)}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            raise SystemExit(f"{shape.name} {variant.name} failed:\n" + (result.stdout + result.stderr)[-3000:])
        return json.loads(record.read_text())


def measure(
    shape: Shape, variants: list[Variant], rounds: int, steps: int, more: list[str], done: Callable[[str], None]
) -> dict[str, Any]:
    """Variant's name → its figures, from runs in turns; `done` is told of each run."""
    records: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants[:: 1 if number % 2 == 0 else -1]:
            records[variant.name].append(run(shape, variant, WARM_UP + steps + 1, more))
            seconds = statistics.median(records[variant.name][-1]["steps"][WARM_UP:])
            done(f"{shape.name} round {number + 1}/{rounds} {variant.name}: {seconds:.4g} s a step")
    figures = {}
    peak = max(record["peak_flops"] for found in records.values() for record in found)
    for name, found in records.items():
        times = [seconds for record in found for seconds in record["steps"][WARM_UP:]]
        pairs = [active for record in found for active in record["active"][WARM_UP + 1 :]]
        active = statistics.mean(pairs or [shape.granularity]) / shape.granularity
        seconds = statistics.median(times)
        figures[name] = {
            "seconds": seconds,
            "all_seconds": times,
            "tokens_per_second": shape.tokens / seconds,
            "active_experts_of_full_size": active,
            "peak_flops": peak,
            "utilization": shape.flops(active) / seconds / peak,
            "update_seconds": statistics.median(record["median_update"] for record in found),
        }
    return figures


def chosen_variants(names: list[str] | None, more: list[str]) -> list[Variant]:
    """Those of these names, or all that differ on this machine.

    Raises:
        ValueError: one of the names means nothing here.
    """
    if not on_gpu(more):
        return [variant for variant in VARIANTS if not names or variant.name in names]
    if names and PLAIN.name in names:
        raise ValueError(f"'{PLAIN.name}' is for a CPU: on a GPU '{STOCK.name}' is that already.")
    return [variant for variant in VARIANTS if variant != PLAIN and (not names or variant.name in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    names = [variant.name for variant in VARIANTS]
    parser.add_argument(
        "--variants", nargs="+", choices=names, metavar="NAME", help=f"{'; '.join(names)} (default: all that differ)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run (default 6)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "step.json")
    parser.add_argument("more", nargs="*", help="further flags of Megatron's, behind --")
    options = parser.parse_args()
    try:
        variants = chosen_variants(options.variants, options.more)
    except ValueError as error:
        parser.error(f"--variants: {error}")
    results = {}
    with progress(len(options.shapes) * len(variants) * options.rounds) as done:
        for name in options.shapes:
            results[name] = measure(SHAPES[name], variants, options.rounds, options.steps, options.more, done)
            save(options.output, {"results": results})
    for shape, figures in ((SHAPES[name], figures) for name, figures in results.items()):
        first = figures[variants[0].name]["seconds"]
        rows = [
            (
                name,
                figure["seconds"],
                f"{figure['tokens_per_second']:,.0f}",
                figure["seconds"] / first,
                figure["active_experts_of_full_size"],
                figure["utilization"],
                f"{figure['update_seconds'] / figure['seconds']:.2%}" if figure["update_seconds"] else "",
            )
            for name, figure in figures.items()
        ]
        columns = [
            "variant",
            "s/step",
            "tokens/s",
            f"s/step over {variants[0].name}",
            "experts/token",
            "of matmul rate",
        ]
        title = f"(E, G) = {shape.name}, {shape.layers} layers, {shape.tokens} tokens"
        show(title, [*columns, "λ update"], rows, options.output)


if __name__ == "__main__":
    main()
