"""Memory of a training step while routing is dense (half of the experts active) and at the target sparsity.

The most that PyTorch holds during a step, beyond weights, gradients and optimizer state. On a GPU, during forward and
backward passes: the optimizer's step takes room for all weights for a moment, which would hide theirs.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from models import FIT_STEPS, Shape
from results import default_output, note, save, show
from step import REMOE, Variant, run

SHAPE = Shape(8, 1, hidden=384, ffn=768, micro_batch=2)
MEMORY = {"BENCHMARK_MEMORY": "1"}
STEADY = replace(REMOE, name="at the target", environment=REMOE.environment | MEMORY)
DENSE = Variant("dense stage", "ReMoE", (), MEMORY)
UNBOUNDED = Variant("dense stage, unbounded", "ReMoE", ("--moe-relu-activation-limit", "0"), MEMORY)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=(8, 64, 128), help="default: 8 64 128")
    parser.add_argument("--output", type=Path, default=default_output("memory"))
    parser.add_argument("more", nargs="*", help="more of Megatron's flags, after --")
    options = parser.parse_args()
    results: dict[int, dict[str, Any]] = {}
    for experts in options.experts:
        found = results[experts] = {}
        for variant in (STEADY, DENSE, UNBOUNDED):
            found[variant.name] = run(replace(SHAPE, experts=experts), variant, FIT_STEPS + 2, options.more)
            save(options.output, {"results": results})
            note(f"{experts} experts, {variant.name}: {found[variant.name]['peak_bytes'] / 2**20:,.0f} MiB")
    rows = []
    for experts, found in results.items():
        peaks = [record["peak_bytes"] for record in found.values()]
        active = [record["active"][-1] for record in found.values()]
        cells = (f"{peak / 2**20:,.0f} MiB ({number:.1f})" for peak, number in zip(peaks, active, strict=True))
        rows.append((experts, *cells, peaks[1] / peaks[0], peaks[2] / peaks[0]))
    columns = ["E", *(f"{name} (experts/token)" for name in found), "dense / target", "unbounded / target"]
    show(f"{SHAPE.layers} layers, hidden {SHAPE.hidden}, {SHAPE.tokens} tokens", columns, rows, options.output)


if __name__ == "__main__":
    main()
