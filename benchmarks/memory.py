"""Memory of a training step while routing is dense (half of the experts active) and at the target sparsity.

The most that PyTorch holds during a step, beyond weights, gradients and optimizer state, which are there all the time.
On a GPU the most during its forward and backward passes: plain PyTorch's Adam takes room for all weights there for a
moment, which would hide theirs.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import FIT_STEPS, Shape
from results import progress, save, show
from step import REMOE, ROOT, Variant, run

SHAPE = Shape(8, 1, hidden=384, ffn=768, micro_batch=2)
EXPERTS = (8, 64, 128)
MEMORY = (("BENCHMARK_PROFILE", "memory"),)
STEADY = replace(REMOE, name="at the target", environment=REMOE.environment + MEMORY)
DENSE = Variant("dense stage", "ReMoE", (), MEMORY)
DENSE_UNBOUNDED = Variant("dense stage, unbounded", "ReMoE", ("--moe-relu-activation-limit", "0"), MEMORY)
VARIANTS = (STEADY, DENSE, DENSE_UNBOUNDED)
STEPS = FIT_STEPS + 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS, help="default: 8 64 128")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "memory.json")
    parser.add_argument("more", nargs="*", help="further flags of Megatron's, behind --")
    options = parser.parse_args()
    rows = []
    results: dict[int, dict[str, Any]] = {}
    with progress(len(options.experts) * len(VARIANTS)) as done:
        for experts in options.experts:
            shape, records = replace(SHAPE, experts=experts), results.setdefault(experts, {})
            for variant in VARIANTS:
                records[variant.name] = run(shape, variant, STEPS, options.more)
                save(options.output, {"results": results})
                done(f"{experts} experts, {variant.name}: {records[variant.name]['peak_bytes'] / 2**20:,.0f} MiB")
    for experts, records in results.items():
        peaks = {name: record["peak_bytes"] / 2**20 for name, record in records.items()}
        active = {name: record["active"][-1] for name, record in records.items()}
        rows.append(
            (
                experts,
                f"{active[STEADY.name]:.2f}",
                f"{peaks[STEADY.name]:,.0f} MiB",
                f"{active[DENSE.name]:.1f}",
                f"{peaks[DENSE.name]:,.0f} MiB",
                f"{peaks[DENSE_UNBOUNDED.name]:,.0f} MiB",
                peaks[DENSE.name] / peaks[STEADY.name],
                peaks[DENSE_UNBOUNDED.name] / peaks[STEADY.name],
            )
        )
    columns = ["E", "experts/token", "at target", "experts/token", "dense stage", "unbounded", "ratio", "unbounded"]
    show(f"{SHAPE.layers} layers, hidden {SHAPE.hidden}, {SHAPE.tokens} tokens", columns, rows, options.output)


if __name__ == "__main__":
    main()
