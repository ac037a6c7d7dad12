"""The picture: loss curves, sparsity with its target, λ, and the experts' load per layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.files import write_aside
from ..common.picture_style import COLOURS, file_pyplot, style
from . import models
from .report import Run

TARGET_COLOUR = "#D55E00"
FIRST_SHARE = 0.05  # of the training that the loss curves leave out: its fall would hide the differences


def smooth(values: list[float], share: float = 0.03) -> list[float]:
    """Centred mean over a share of the values, shorter at both ends."""
    half = max(1, round(len(values) * share / 2))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(path: Path, runs: Mapping[str, Run], summary: dict[str, Any]) -> None:
    """Write the picture, aside and renamed.

    Args:
        path: a .png file.
        runs: model → its figures.
        summary: see `report.summarize`.
    """
    pyplot = file_pyplot()
    remoe, iterations = runs["remoe"], summary["iterations"]
    with pyplot.rc_context(style(font_size=11, pad=(0.15, 0.15))):
        figure = pyplot.figure(figsize=(16, 11), dpi=100, layout="constrained")
        ((loss, sparsity), (coefficient, load)) = figure.subplots(2, 2)
        _draw_loss(loss, runs, summary)
        _draw_sparsity(sparsity, remoe, summary)
        coefficient.plot(*remoe.series("l1_coefficient"), color=COLOURS["remoe"], linewidth=1.5)
        coefficient.set(title="ReMoE: coefficient λ of the L1 term", xlabel="iteration", ylabel="λ", yscale="log")
        coefficient.set_xlim(0, iterations)
        load.remove()
        _draw_load(figure, load.get_subplotspec(), remoe.expert_load(iterations))
        write_aside(path, figure.savefig)
        pyplot.close(figure)


def _draw_loss(axes: Any, runs: Mapping[str, Run], summary: dict[str, Any]) -> None:
    first = FIRST_SHARE * summary["iterations"]
    for model, title in models.NAMES.items():
        colour, final = COLOURS[model], summary[model]["val_loss"]
        iterations, values = runs[model].series("lm_loss")
        shown = [point for point in zip(iterations, smooth(values), strict=True) if point[0] >= first]
        axes.plot(*zip(*shown, strict=True), color=colour, linewidth=1.8)
        axes.plot(
            summary["iterations"], final, "o", color=colour, markersize=9, markeredgecolor="white", zorder=3,
            clip_on=False, label=f"{title}: {final:.3f}",
        )  # fmt: skip
    axes.set(title="Loss in training (smoothed), and on held-out text at the end", xlabel="iteration", xscale="log")
    axes.set_ylabel("nats per byte")
    axes.set_xlim(first, summary["iterations"])
    _plain_log_ticks(axes, first, summary["iterations"])
    axes.legend(title="held-out text")


def _plain_log_ticks(axes: Any, first: float, last: float) -> None:
    """Round numbers as ticks: a logarithmic axis over little more than a decade has hardly any by itself."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    rounds = [m * 10**e for e in range(7) for m in (1, 2, 3, 5)]
    axes.xaxis.set_major_locator(FixedLocator([value for value in rounds if first <= value <= last]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())


def _draw_sparsity(axes: Any, remoe: Run, summary: dict[str, Any]) -> None:
    colour, target = COLOURS["remoe"], summary["remoe"]["sparsity_target"]
    (steps, low), (_, high) = (remoe.series(f"{name}_layer_sparsity") for name in ("lowest", "highest"))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label="layers")
    axes.plot(*remoe.series("sparsity"), color=colour, linewidth=1.2, label="all layers")
    axes.axhline(target, color=TARGET_COLOUR, linestyle="--", linewidth=1.5, label=f"target {target:.3f}")
    reached = summary["remoe"]["sparsity_last_quarter"]
    axes.set(title=f"ReMoE: sparsity of the routing (last quarter: {reached:.3f})", xlabel="iteration", ylim=(0, 1))
    axes.set_ylabel("share of token–expert pairs that are off")
    axes.set_xlim(0, summary["iterations"])
    axes.legend(loc="lower right")


def _draw_load(figure: Any, place: Any, load: dict[int, list[float]]) -> None:
    """One row of bars a layer."""
    rows = place.subgridspec(len(load), 1)
    highest = max(max(shares) for shares in load.values())
    first = None
    for row, (layer, shares) in enumerate(load.items()):
        axes = figure.add_subplot(rows[row], sharex=first)
        first = first or axes
        even = models.SIZE.topk / len(shares)
        bars = axes.bar(range(len(shares)), shares, color=COLOURS["remoe"], alpha=0.85)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line of the even share
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=9, padding=2, bbox=behind)
        axes.axhline(even, color=TARGET_COLOUR, linestyle="--", linewidth=1.5)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel=f"layer {layer}", ylim=(0, 1.25 * max(highest, even)), xticks=range(len(shares)))
        axes.yaxis.set_major_formatter(_percent)
        if row == 0:
            axes.set_title(f"ReMoE: tokens that each expert gets, last quarter (even: {even:.1%})")
        if row + 1 == len(load):
            axes.set_xlabel("expert")
        else:
            axes.tick_params(labelbottom=False)


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"
