"""Where the time of a training step goes: PyTorch's operations by kind, of one step under the profiler.

On a GPU that is the time of its kernels; what the device waits for the host is in none of them.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from models import FIT_STEPS
from results import progress, save, show
from step import REMOE, ROOT, SHAPES, run

PROFILED = replace(REMOE, environment=(*REMOE.environment, ("BENCHMARK_PROFILE", "operations")))
STEPS = FIT_STEPS + 2
# The first whose pattern is found in an operation's name.
KINDS = {
    "attention": r"attention|flash|sdpa",
    "products": r"::(mm|addmm_?|bmm|_grouped_mm|_linear_pointwise)$|gemm|matmul",
    "Adam": r"adam|Optimizer|_foreach_",  # the last on a GPU, with clipping's
    "taking and adding rows": r"index_select|index_add|gather|scatter|embedding",
    "copies": r"copy_|clone|contiguous|Memcpy",
    "new memory": r"empty|zeros|zero_|fill_|resize_|Memset",
}
REST = "the rest, element by element"


def kind_of(operation: str) -> str:
    """One of `KINDS` or `REST`."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), REST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "operations.json")
    parser.add_argument("more", nargs="*", help="further flags of Megatron's, behind --")
    options = parser.parse_args()
    shares, results = {}, {}
    with progress(len(options.shapes)) as done:
        for shape in (SHAPES[name] for name in options.shapes):
            operations = results[shape.name] = run(shape, PROFILED, STEPS, options.more)["operations"]
            save(options.output, {"seconds": results})
            total = sum(operations.values())
            shares[shape.name] = dict.fromkeys([*KINDS, REST], 0.0)
            for operation, seconds in operations.items():
                shares[shape.name][kind_of(operation)] += seconds / total
            done(f"{shape.name}: {total:.3g} s under the profiler")
    rows = [(kind, *(f"{found[kind]:.1%}" for found in shares.values())) for kind in [*KINDS, REST]]
    show("Share of a step's time", ["kind of operation", *shares], rows, options.output)


if __name__ == "__main__":
    main()
