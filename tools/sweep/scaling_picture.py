"""The picture: validation loss against size, number of experts and granularity, MoE and ReMoE side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.picture_style import COLOURS, file_pyplot, style
from .plan import FEW_EXPERTS, FIGURES, SIZE, SIZES, WHOLE, Run, figures_of

Point = tuple[Run, float]  # a finished run and its validation loss

TITLES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE (ReLU)"}
MARKERS = {"dense": "D", "moe": "s", "remoe": "o"}
AXES = {
    "size": ("Size", f"E = {FEW_EXPERTS}, G = {WHOLE}", "active size"),
    "experts": ("Experts", f"G = {WHOLE}", "number of experts E"),
    "granularity": ("Granularity", f"E = {FEW_EXPERTS}", "granularity G"),
}


def draw(path: Path, points: Sequence[Point], resized: bool) -> None:
    """Write the picture: a panel for each axis along which there is more than one value.

    Args:
        path: a .png file.
        points: the finished runs.
        resized: whether models are not of the size that their runs are named after, so that it is not told.
    """
    from matplotlib.lines import Line2D

    pyplot, panels = file_pyplot(), _panels(points)
    with pyplot.rc_context(style(font_size=13, pad=(0.12, 0.1))):
        figure = pyplot.figure(figsize=(5 * max(2, len(panels)), 4.8), dpi=100, layout="constrained")
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1)
            _draw_panel(axes, panel, points, resized)
            if place == 0:
                axes.set_ylabel("validation loss (nats per token)")
        shown = [routing for routing in TITLES if any(run.routing == routing for run, _ in points)]
        handles = []
        for name in shown:
            only_line = name == "dense" and "size" not in panels
            look = {"linestyle": "--"} if only_line else {"marker": MARKERS[name], "markersize": 8}
            handles.append(Line2D([], [], color=COLOURS[name], linewidth=2, **look))
        figure.legend(handles, [TITLES[name] for name in shown], loc="outside upper center", ncols=len(shown))
        figure.savefig(path)
        pyplot.close(figure)


def position(run: Run, figure: str) -> int:
    """Where a run lies on the axis of a figure."""
    if figure == "size":
        return SIZES.index(run.size)
    value = run.experts if figure == "experts" else run.granularity
    assert value is not None, run
    return value


def _panels(points: Sequence[Point]) -> list[str]:
    places = {name: {position(run, name) for run, _ in points if name in figures_of(run)} for name in FIGURES}
    lines = [name for name, values in places.items() if len(values) > 1]
    return lines or [name for name, values in places.items() if values]


def _draw_panel(axes: Any, panel: str, points: Sequence[Point], resized: bool) -> None:
    title, fixed, label = AXES[panel]
    if panel != "size" and not resized:
        fixed = f"{SIZE.upper()}, {fixed}"
    ticks = set()
    for routing, colour in COLOURS.items():
        series = sorted((position(run, panel), loss) for run, loss in points if _belongs(run, panel, routing))
        if not series:
            continue
        ticks |= {place for place, _ in series}
        axes.plot(
            *zip(*series, strict=True), color=colour, marker=MARKERS[routing], linewidth=2, markersize=8,
            markeredgecolor="white", clip_on=False, zorder=3,
        )  # fmt: skip
    if panel != "size":
        axes.set_xscale("log", base=2)
        for run, loss in points:
            if run == Run(SIZE, "dense"):
                axes.axhline(loss, color=COLOURS["dense"], linestyle="--", linewidth=1.8)
                at = axes.get_yaxis_transform()
                axes.text(1, loss, "dense", transform=at, ha="right", va="bottom", fontsize=11, color=COLOURS["dense"])
    axes.set_title(title)
    axes.set_title(fixed, loc="right", fontsize=11, color="#555555", fontweight="normal")
    axes.set_xlabel(label)
    axes.margins(y=0.1)
    _set_ticks(axes, sorted(ticks), panel)


def _belongs(run: Run, panel: str, routing: str) -> bool:
    return run.routing == routing and panel in figures_of(run)


def _set_ticks(axes: Any, ticks: list[int], panel: str) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    labels = [SIZES[tick].upper() for tick in ticks] if panel == "size" else [f"{tick:,}" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
