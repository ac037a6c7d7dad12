"""Draw losses with a dot for each seed: over a setting with a line for each arm, or in a row for each arm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..console.picture_style import line_styles, picture, routing_color
from .arms import ARMS
from .significance import half_width
from .tables import interval

Losses = Mapping[str, Mapping[int, float]]  # arm → seed → nats per byte
IN_A_ROW = 5
MARGIN = 0.6  # room for the labels at each end of the loss axis of `plot_rows`, as a share of the losses' range


@dataclass
class LossPanel:
    """A plot of losses over a setting, with a line for each arm.

    Attributes:
        title, label: of the panel, and of its horizontal axis.
        lines: arm and a note → position on the horizontal axis → losses of the seeds.
        ticks: position → label.
        is_log: whether the horizontal axis is logarithmic.
    """

    title: str
    label: str
    lines: Mapping[tuple[str, str], Mapping[float, Sequence[float]]]
    ticks: Mapping[float, str]
    is_log: bool


def color_key(arm: str) -> str:
    """Return the name of an arm's color in `picture_style`."""
    routing = arm.partition("-")[0]
    return ARMS[arm].router or ("topk" if routing == "moe" else routing)


def draw(path: Path, panels: Sequence[LossPanel], label: str) -> None:
    """Write a .png file of at least one panel; `label` is the label of the vertical axis."""
    from matplotlib.ticker import NullLocator

    names = [*dict.fromkeys(name for panel in panels for name in panel.lines)]
    styles = line_styles(color_key(arm) for arm, _ in names)
    colors = {name: color for name, (color, _) in zip(names, styles, strict=True)}
    columns, rows = min(IN_A_ROW, len(panels)), -(-len(panels) // IN_A_ROW)
    with picture(path, font_size=13, pad=(0.12, 0.1), figsize=(5 * max(2, columns), 4.8 * rows)) as figure:
        for number, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, number)
            for name, line in panel.lines.items():
                points = sorted(line.items())
                title = " ".join(filter(None, (ARMS[name[0]].title, name[1])))
                look = {"color": colors[name], "marker": ARMS[name[0]].marker, "markersize": 8}
                axes.plot([x for x, _ in points], [fmean(seeds) for _, seeds in points], label=title, **look)
                for x, seeds in points:
                    axes.plot([x] * len(seeds), seeds, ".", color=colors[name], alpha=0.6)
            axes.set(title=panel.title, xlabel=panel.label, xscale="log" if panel.is_log else "linear")
            axes.set_xticks([*panel.ticks], [*panel.ticks.values()])
            axes.xaxis.set_minor_locator(NullLocator())
            if number % columns == 1 or columns == 1:
                axes.set_ylabel(label)
        legends = [axes.get_legend_handles_labels() for axes in figure.axes]
        handles = {title: handle for legend in legends for handle, title in zip(*legend, strict=True)}
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), max(3, columns)))


def draw_final_losses(path: Path, panels: Mapping[str, Losses], base: str) -> None:
    """Write a .png file with a panel of `plot_rows` for each title; gaps are measured from the arm `base`."""
    rows = -(-len(panels) // 3)  # at most three panels side by side
    columns = -(-len(panels) // rows)
    height = 1 + 0.8 * max(map(len, panels.values()))
    with picture(path, font_size=13, pad=(0.12, 0.1), figsize=(max(8, 6 * columns), height * rows)) as figure:
        for number, (title, losses) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, number)
            plot_rows(axes, losses, base)
            axes.set(title=title, xlabel="nats per byte; lower is better")
        note = "Loss on held-out text: seeds, mean with 95 % interval" + ("\n" if columns == 1 else " ")
        note += f"(difference from {ARMS[base].title})"
        figure.suptitle(note, x=0.01, ha="left")


def plot_rows(axes: Any, losses: Losses, base: str) -> None:
    """Draw a row for each arm: a small dot for each seed, and the mean with its 95 % interval.

    The label is the mean to three digits, with the mean difference from the arm `base` over the seeds that both have.
    """
    others = losses.get(base, {})
    for row, (arm, by_seed) in enumerate(losses.items()):
        seeds = [*by_seed.values()]
        color, half, mean = routing_color(color_key(arm)), half_width(seeds), fmean(seeds)
        alpha, size = (0.5, 8) if half < math.inf else (1, 15)
        axes.plot(seeds, [row] * len(seeds), "o", color=color, alpha=alpha, markersize=size)
        if half < math.inf:
            axes.errorbar(mean, row, xerr=half, color=color, capsize=6, marker="|", markersize=20)
        pairs = [by_seed[seed] - others[seed] for seed in by_seed if seed in others]
        difference = f" ({interval(pairs, '+', digits=3)})".replace("-", "−") if arm != base and pairs else ""
        look = {"textcoords": "offset points", "ha": "center", "fontsize": 14}
        axes.annotate(f"{mean:.3f}{difference}", (mean, row), (0, 12), **look)
    axes.margins(x=MARGIN)
    axes.set_yticks(range(len(losses)), [ARMS[arm].label for arm in losses])
    axes.set_ylim(len(losses) - 0.5, -0.7)  # the first arm at the top
