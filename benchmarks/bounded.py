"""A training step at the target sparsity with and without the bound on activations, in turns within one process."""

import argparse
import statistics
from pathlib import Path

from results import save, show
from step import REMOE, ROOT, SHAPES, WARM_UP, Variant, run

IN_TURNS = Variant("in turns", "ReMoE", (), (*REMOE.environment, ("BENCHMARK_LIMIT_IN_TURNS", "1")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES], help="default: all three")
    parser.add_argument("--pairs", type=int, default=20, help="measured steps of each kind (default 20)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "bounded.json")
    parser.add_argument("more", nargs="*", help="further flags of Megatron's, behind --")
    options = parser.parse_args()
    rows, results = [], {}
    for shape in (shape for shape in SHAPES if shape.name in options.shapes):
        steps = run(shape, IN_TURNS, WARM_UP + 2 * options.pairs + 1, options.more)["steps"][WARM_UP:]
        bounded, unbounded = steps[::2], steps[1::2]  # as the entry takes turns
        ratios = [first / second for first, second in zip(bounded, unbounded, strict=True)]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        results[shape.name] = {"bounded": bounded, "unbounded": unbounded}
        medians = statistics.median(bounded), statistics.median(unbounded)
        rows.append((shape.name, *medians, f"{statistics.median(ratios):.4f}", f"{lower:.3f} to {upper:.3f}"))
    columns = ["(E, G)", "bounded, s/step", "unbounded, s/step", "bounded / unbounded", "middle half of the pairs"]
    show("A step at the target, neighbours in one process", columns, rows)
    save(options.output, {"seconds": results})


if __name__ == "__main__":
    main()
