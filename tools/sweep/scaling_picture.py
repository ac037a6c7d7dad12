"""The picture: validation loss against size, number of experts and granularity, MoE and ReMoE side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.picture_style import COLOURS, file_pyplot, style
from .plan import FEW_EXPERTS, SIZE, SIZES, WHOLE, WIDE, Run, figures_of

Point = tuple[Run, float]  # a finished run and its validation loss

TITLES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE (ReLU)"}
MARKERS = {"dense": "D", "moe": "s", "remoe": "o"}
PROTOCOLS = {"": "", "warmup": ", near-dense warm-up", "matched": ", FLOPs matched"}
OTHER_MARKERS = {"warmup": "^", "matched": "v"}  # or else X
AXES = {
    "size": ("Size", f"E = {FEW_EXPERTS}, G = {WHOLE}", "active size"),
    "experts": ("Experts", f"G = {WHOLE}", "number of experts E"),
    "granularity": ("Granularity", f"E = {FEW_EXPERTS}", "granularity G"),
    "l1-init": ("First L1 coefficient", f"E = {FEW_EXPERTS}", "λ₀"),
    "l1-multiplier": ("L1 multiplier", f"E = {FEW_EXPERTS}", "α"),
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
        shown = _kinds(points)
        handles = []
        for routing, protocol in shown:
            only_line = routing == "dense" and "size" not in panels
            look = {"linestyle": "--"} if only_line else _look(routing, protocol)
            handles.append(Line2D([], [], color=COLOURS[routing], linewidth=2, **look))
        titles = [TITLES[routing] + PROTOCOLS.get(protocol, f", {protocol}") for routing, protocol in shown]
        figure.legend(handles, titles, loc="outside upper center", ncols=len(shown))
        figure.savefig(path)
        pyplot.close(figure)


def position(run: Run, figure: str) -> float:
    """Where a run lies on the axis of a figure."""
    if figure == "size":
        return SIZES.index(run.size)
    return float(getattr(run, figure.replace("-", "_")))


def _kinds(points: Sequence[Point]) -> list[tuple[str, str]]:
    """Routing and protocol of each line."""
    found = {(run.routing, run.protocol) for run, _ in points}
    return sorted(found, key=lambda kind: ([*TITLES].index(kind[0]), kind[1]))


def _look(routing: str, protocol: str) -> dict[str, Any]:
    marker = OTHER_MARKERS.get(protocol, "X") if protocol else MARKERS[routing]
    return {"marker": marker, "markersize": 8, "linestyle": ":" if protocol else "-"}


def _panels(points: Sequence[Point]) -> list[str]:
    places = {name: {position(run, name) for run, _ in points if name in figures_of(run)} for name in AXES}
    lines = [name for name, values in places.items() if len(values) > 1]
    return lines or [name for name, values in places.items() if values]


def _draw_panel(axes: Any, panel: str, points: Sequence[Point], resized: bool) -> None:
    title, fixed, label = AXES[panel]
    if panel != "size" and not resized:
        fixed = f"{SIZE.upper()}, {fixed}"
    ticks = set()
    for kind in _kinds(points):
        series = sorted(
            (position(run, panel), loss)
            for run, loss in points
            if (run.routing, run.protocol) == kind and panel in figures_of(run)
        )
        if not series:
            continue
        ticks |= {place for place, _ in series}
        axes.plot(
            *zip(*series, strict=True), color=COLOURS[kind[0]], linewidth=2, markeredgecolor="white", clip_on=False,
            zorder=3, **_look(*kind),
        )  # fmt: skip
    if panel != "size":
        axes.set_xscale("linear" if panel == "l1-multiplier" else "log")
    if panel in ("experts", "granularity"):
        wide = Run(SIZE, "dense", expansion=WIDE)
        lines = {Run(SIZE, "dense"): "dense"} | ({wide: f"dense x {WIDE}"} if panel == "experts" else {})
        for run, loss in points:
            if run in lines:
                axes.axhline(loss, color=COLOURS["dense"], linestyle="--", linewidth=1.8)
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                axes.text(1, loss, lines[run], fontsize=11, color=COLOURS["dense"], **place)
    axes.set_title(title)
    axes.set_title(fixed, loc="right", fontsize=11, color="#555555", fontweight="normal")
    axes.set_xlabel(label)
    axes.margins(y=0.1)
    _set_ticks(axes, sorted(ticks), panel)


def _set_ticks(axes: Any, ticks: list[float], panel: str) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    labels = [SIZES[int(tick)].upper() for tick in ticks] if panel == "size" else [f"{tick:g}" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
