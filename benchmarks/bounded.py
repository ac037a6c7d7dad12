"""A training step at the target sparsity with and without the bound on activations, in turns within one process."""

import argparse
import statistics
from pathlib import Path

from results import progress, save, show
from step import REMOE, ROOT, SHAPES, WARM_UP, Variant, run

IN_TURNS = Variant("in turns", "ReMoE", (), (*REMOE.environment, ("BENCHMARK_LIMIT_IN_TURNS", "1")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    parser.add_argument("--pairs", type=int, default=20, help="measured steps of each kind (default 20)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "bounded.json")
    parser.add_argument("more", nargs="*", help="further flags of Megatron's, behind --")
    options = parser.parse_args()
    rows, results = [], {}
    with progress(len(options.shapes)) as done:
        for shape in (SHAPES[name] for name in options.shapes):
            steps = run(shape, IN_TURNS, WARM_UP + 2 * options.pairs + 1, options.more)["steps"][WARM_UP:]
            bounded, unbounded = steps[::2], steps[1::2]  # as the entry takes turns
            results[shape.name] = {"bounded": bounded, "unbounded": unbounded}
            save(options.output, {"seconds": results})
            ratios = [first / second for first, second in zip(bounded, unbounded, strict=True)]
            lower, middle, upper = statistics.quantiles(ratios, n=4)
            medians = statistics.median(bounded), statistics.median(unbounded)
            rows.append((shape.name, *medians, f"{middle:.4f}", f"{lower:.3f} to {upper:.3f}"))
            done(f"{shape.name}: {middle:.4f}")
    columns = ["(E, G)", "bounded, s/step", "unbounded, s/step", "bounded / unbounded", "middle half of the pairs"]
    show("A step at the target, neighbours in one process", columns, rows, options.output)


if __name__ == "__main__":
    main()
