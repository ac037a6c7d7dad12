"""Tokens per second against micro-batch, sequence, number of experts and granularity, as a picture.

ReMoE at its target sparsity, top-k, and top-k in Megatron's own local layers.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from models import Shape
from results import progress, save, show
from step import REMOE, ROOT, STOCK, TOPK, WARM_UP, run

CENTER = Shape(8, 1, hidden=384, ffn=1024, micro_batch=4, sequence=512)
AXES: dict[str, tuple[str, list[int]]] = {
    "micro_batch": ("sequences per micro-batch", [1, 4, 16]),
    "sequence": ("tokens per sequence", [128, 512, 2048]),
    "experts": ("experts E", [4, 16, 64]),
    "granularity": ("granularity G (E = 8)", [1, 4, 16]),
}
VARIANTS = {variant.name: variant for variant in (REMOE, TOPK, STOCK)}
COLORS = {REMOE.name: "#d1495b", TOPK.name: "#2e6f95", STOCK.name: "#8a8f98"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each run (default 5)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "scaling.json")
    parser.add_argument("more", nargs="*", help="further flags of Megatron's, behind --")
    options = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    rows = []
    points = sum(len(values) for _, values in AXES.values())
    with progress(points * len(VARIANTS)) as done:
        for axis, (label, values) in AXES.items():
            results[axis] = {name: [] for name in VARIANTS}
            for value in values:
                shape = replace(CENTER, **{axis: value})
                for name, variant in VARIANTS.items():
                    seconds = run(shape, variant, WARM_UP + options.steps + 1, options.more)["steps"][WARM_UP:]
                    results[axis][name].append(shape.tokens / statistics.median(seconds))
                    save(options.output, {"center": str(CENTER), "axes": AXES, "tokens_per_second": results})
                    done(f"{label} = {value}, {name}: {results[axis][name][-1]:,.0f} tokens/s")
                rows.append((f"{label} = {value}", *(f"{results[axis][name][-1]:,.0f}" for name in VARIANTS)))
    title = f"Tokens per second, around {CENTER.layers} layers, hidden {CENTER.hidden}, FFN {CENTER.ffn}"
    show(title, ["", *VARIANTS], rows, options.output)
    draw(results, options.output.with_suffix(".png"))


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel for each axis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 3.2), sharey=True, layout="constrained")
    for panel, (axis, (label, values)) in zip(panels, AXES.items(), strict=True):
        for name, speeds in results[axis].items():
            panel.plot(values, speeds, marker="o", color=COLORS[name], label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(value) for value in values])
        panel.set_xlabel(label)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens per second")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
