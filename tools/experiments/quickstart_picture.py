"""Draw the loss curves, the sparsity and its target, λ, and the load of the experts by layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..console.picture_style import TARGET, picture, routing_color
from ..recipes import tiny
from ..runs.run_figures import RunFigures, smooth
from .quickstart_report import is_late

SKIPPED_SHARE = 0.05  # of the loss curves at their steep start, which would hide the differences


def draw(path: Path, runs: Mapping[str, RunFigures], summary: dict[str, Any]) -> None:
    """Write the picture from each model's figures and the summary of `quickstart_report.summarize`."""
    remoe, iterations = runs["remoe"], summary["iterations"]
    with picture(path, font_size=11, pad=(0.15, 0.15), figsize=(16, 11)) as figure:
        ((loss, sparsity), (coefficient, load)) = figure.subplots(2, 2)
        _draw_loss(loss, runs, summary)
        _draw_sparsity(sparsity, remoe, summary)
        coefficient.plot(*remoe.curve("l1_coefficient"), color=routing_color("remoe"), linewidth=1.5)
        coefficient.set(title="ReMoE: coefficient λ of the L1 term", xlabel="iteration", ylabel="λ", yscale="log")
        coefficient.set_xlim(0, iterations)
        load.remove()
        draw_load(figure, load.get_subplotspec(), late_load(remoe, iterations))


def late_load(figures: RunFigures, last: int) -> dict[int, NDArray[np.float64]]:
    """Return layer → share of its tokens that each expert gets, the mean over the last quarter: [experts]."""
    late = [figures.loads[iteration] for iteration in figures.loads if is_late(np.array(iteration), last)]
    return {layer: np.mean([load[layer] for load in late], axis=0) for layer in late[-1]}


def _draw_loss(axes: Any, runs: Mapping[str, RunFigures], summary: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    first = SKIPPED_SHARE * summary["iterations"]
    for model, title in tiny.NAMES.items():
        colour, final = routing_color(model), summary[model]["val_loss"]
        iterations, values = smooth(runs[model].curve("lm_loss"))
        shown = iterations >= first
        axes.plot(iterations[shown], values[shown], color=colour, linewidth=1.8)
        axes.plot(
            summary["iterations"], final, "o", color=colour, markersize=9, markeredgecolor="white", zorder=3,
            clip_on=False, label=f"{title}: {final:.3f}",
        )  # fmt: skip
    axes.set(title="Loss in training (smoothed), and on held-out text at the end", xlabel="iteration", xscale="log")
    axes.set_ylabel("nats per byte")
    axes.set_xlim(first, summary["iterations"])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))  # the default has few ticks over a single decade
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(title="held-out text")


def _draw_sparsity(axes: Any, remoe: RunFigures, summary: dict[str, Any]) -> None:
    colour, target = routing_color("remoe"), summary["remoe"]["sparsity_target"]
    (steps, low), (_, high) = (remoe.curve(f"{name}_layer_sparsity") for name in ("lowest", "highest"))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label="layers")
    axes.plot(*remoe.curve("sparsity"), color=colour, linewidth=1.2, label="all layers")
    axes.axhline(target, color=TARGET, linestyle="--", linewidth=1.5, label=f"target {target:.3f}")
    reached = summary["remoe"]["sparsity_last_quarter"]
    axes.set(title=f"ReMoE: sparsity of the routing (last quarter: {reached:.3f})", xlabel="iteration", ylim=(0, 1))
    axes.set_ylabel("share of token–expert pairs that are off")
    axes.set_xlim(0, summary["iterations"])
    axes.legend(loc="lower right")


def draw_load(figure: Any, place: Any, load: Mapping[int, NDArray[np.float64]]) -> None:
    """Draw one row of bars for each layer, with the shares above all bars and the line of the even share."""
    rows = place.subgridspec(len(load), 1)
    highest = max(shares.max() for shares in load.values())
    first = None
    for row, (layer, shares) in enumerate(load.items()):
        axes = figure.add_subplot(rows[row], sharex=first)
        first = first or axes
        even = tiny.SIZE.topk / len(shares)
        axes.bar(range(len(shares)), shares, color=routing_color("remoe"), alpha=0.85)
        above = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "fontsize": 9}
        for expert, share in enumerate(shares):
            axes.text(expert, 0.99, f"{share:.1%}", **above)
        axes.axhline(even, color=TARGET, linestyle="--", linewidth=1.5)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel=f"layer {layer}", ylim=(0, 1.25 * max(highest, even)), xticks=range(len(shares)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if row == 0:
            axes.set_title(f"ReMoE: tokens that each expert gets, last quarter (even: {even:.1%})")
        if row + 1 == len(load):
            axes.set_xlabel("expert")
        else:
            axes.tick_params(labelbottom=False)
