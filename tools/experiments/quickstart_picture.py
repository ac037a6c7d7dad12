"""Draw the final losses, the sparsity and its target, λ, and the load of the experts by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..console.picture_style import TARGET, picture, routing_color
from ..recipes import tiny
from ..runs.run_figures import RunFigures
from .pictures import plot_rows


def draw(path: Path, runs: Mapping[str, RunFigures], summary: Mapping[str, Any]) -> None:
    """Write the picture from each model's metrics and the summary of `quickstart.summarize`."""
    remoe, iterations = runs["remoe"], summary["iterations"]
    with picture(path, font_size=11, pad=(0.15, 0.15), figsize=(16, 11)) as figure:
        ((loss, sparsity), (coefficient, load)) = figure.subplots(2, 2)
        plot_rows(loss, {model: {0: summary[model]["val_loss"]} for model in tiny.NAMES}, "dense")
        loss.set(
            title="Loss on held-out text at the end (difference from dense)", xlabel="nats per byte; lower is better"
        )
        _draw_sparsity(sparsity, remoe, summary)
        coefficient.plot(*remoe.curve("l1_coefficient"), color=routing_color("remoe"), linewidth=1.5)
        coefficient.set(title="ReMoE: coefficient λ of the L1 term", xlabel="iteration", ylabel="λ", yscale="log")
        _draw_load(load, late_load(remoe, iterations), remoe.topk / summary["experts"])


def late_load(metrics: RunFigures, last: int) -> dict[int, NDArray[np.float64]]:
    """Return layer → share of its tokens whose gate for each expert is positive, float `[E]`, over the last quarter."""
    late = [loads for iteration, loads in metrics.loads.items() if iteration > 0.75 * last]
    return {layer: np.mean([loads[layer] for loads in late], axis=0) for layer in late[-1]}


def _draw_sparsity(axes: Any, remoe: RunFigures, summary: Mapping[str, Any]) -> None:
    color, target = routing_color("remoe"), summary["remoe"]["sparsity_target"]
    (steps, low), (_, high) = (remoe.curve(f"{name}_layer_sparsity") for name in ("lowest", "highest"))
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, label="lowest to highest layer")
    axes.plot(*remoe.curve("sparsity"), color=color, linewidth=1.2, label="all layers")
    axes.axhline(target, color=TARGET, linestyle="--", linewidth=1.5, label=f"target {target:.3f}")
    reached = summary["remoe"]["sparsity_last_quarter"]
    title = f"ReMoE: sparsity of all gates (of those computed: {reached:.3f})"
    axes.set(title=title, xlabel="iteration", ylabel="share of token–expert pairs that are off", ylim=(None, 1))
    axes.legend(loc="lower right")


def _draw_load(axes: Any, load: Mapping[int, NDArray[np.float64]], even: float) -> None:
    """Draw a bar for each expert of each layer, and the line of the even share."""
    width, experts = 0.8 / len(load), np.arange(len(next(iter(load.values()))))
    for index, (layer, shares) in enumerate(load.items()):
        left = experts - 0.4 + index * width
        look = {"color": routing_color("remoe"), "alpha": 1 - index / len(load), "label": f"layer {layer}"}
        axes.bar(left, shares, width, align="edge", **look)
    axes.axhline(even, color=TARGET, linestyle="--", linewidth=1.5, label=f"even: {100 * even:.1f} %")
    axes.set(title="ReMoE: tokens whose gate for the expert is positive, last quarter", xlabel="expert")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.legend()
