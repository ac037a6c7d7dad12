"""Draw the validation loss along each axis, routings side by side."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...console.picture_style import MUTED, picture, routing_color
from .plan import AXES, BASE_SIZE, FEW_EXPERTS, FIGURES, GROUPS, PROTOCOLS, ROUTINGS, SIZES, WHOLE, Run, figures_of

Points = Sequence[tuple[Run, float]]  # finished runs and their validation losses
Line = tuple[str, str, int]  # routing, protocol, and granularity on axes that do not vary it, else 0

TITLES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE (ReLU)"}
IN_SHORT = {"moe": "MoE", "remoe": "ReMoE"}
MARKERS = {"dense": "D", "moe": "s", "remoe": "o"}
PANELS = {
    "size": ("Size", f"E = {FEW_EXPERTS}, G = {WHOLE}", "size of the launch script"),
    "experts": ("Experts", f"G = {WHOLE}", "number of experts E"),
    "granularity": ("Granularity", f"E = {FEW_EXPERTS}", "granularity G"),
    **{name: (axis.title, f"E = {FEW_EXPERTS}", axis.label) for name, axis in AXES.items()},
    **{
        name: (title, f"E = {FEW_EXPERTS}, G = {granularity}", "validation loss (nats per token)")
        for name, (title, granularity, _) in GROUPS.items()
    },
}
IN_A_ROW = 5


def draw(path: Path, points: Points) -> None:
    """Write the picture of finished runs, with a panel for each axis that has more than one value."""
    panels = _panels(points)
    columns, rows = min(IN_A_ROW, len(panels)), math.ceil(len(panels) / IN_A_ROW)
    size = 5 * max(2, columns), 4.8 * rows
    with picture(path, font_size=13, pad=(0.12, 0.1), figsize=size) as figure:
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            if panel in GROUPS:
                _draw_compared(axes, panel, points)
            else:
                _draw_panel(axes, panel, points)
                if place % columns == 0:
                    axes.set_ylabel("validation loss (nats per token)")
            title, fixed, label = PANELS[panel]
            axes.set_title(title)
            axes.set_title(fixed, loc="right", fontsize=11, color=MUTED, fontweight="normal")
            axes.set_xlabel(label)
        legends = [axes.get_legend_handles_labels() for axes in figure.axes]
        handles = {title: handle for legend in legends for handle, title in zip(*legend, strict=True)}
        if handles:
            count = min(len(handles), max(3, columns))
            figure.legend(handles.values(), handles, loc="outside upper center", ncols=count)


def _position(run: Run, figure: str) -> float:
    """Return the position of a run on the axis of a figure."""
    if figure == "size":
        return SIZES.index(run.size)
    if figure in AXES:
        return run.value if run.axis else AXES[figure].base
    return float(getattr(run, figure))


def _title(routing: str, protocol: str) -> str:
    return f"{IN_SHORT[routing]}, {PROTOCOLS[f'{routing}-{protocol}'].title}" if protocol else TITLES[routing]


def _look(routing: str, protocol: str) -> dict[str, Any]:
    marker = PROTOCOLS[f"{routing}-{protocol}"].marker if protocol else MARKERS[routing]
    shape = {"marker": marker, "markersize": 12 if marker == "*" else 8, "markeredgecolor": "white"}
    return shape | {"color": routing_color(routing), "linestyle": ":" if protocol else "-", "linewidth": 2}


def _lines(points: Points, panel: str) -> dict[Line, list[tuple[float, float]]]:
    """Return the points of each line; single points of axes and protocols only if there is nothing else."""
    lines = defaultdict(list)
    for run, loss in points:
        if panel in figures_of(run):
            kept = (run.granularity or 0) if panel in AXES else 0
            lines[run.routing, run.protocol, kept].append((_position(run, panel), loss))
    drawn = [line for line in lines if len(lines[line]) > 1 or (panel not in AXES and not line[1])]
    return {
        line: sorted(lines[line]) for line in sorted(drawn or lines, key=lambda line: (ROUTINGS.index(line[0]), line))
    }


def _panels(points: Points) -> list[str]:
    places = {name: {x for line in _lines(points, name).values() for x, _ in line} for name in (*FIGURES, *AXES)}
    panels = [name for name, values in places.items() if len(values) > 1]
    for name in GROUPS:
        if any(run.kind in PROTOCOLS and name in figures_of(run) for run, _ in points):
            panels.append(name)
    single = [name for name, values in places.items() if values]
    return panels or [name for name in single if name in FIGURES] or single or ["experts"]


def _draw_compared(axes: Any, panel: str, points: Points) -> None:
    """Draw a row for each run at the common point; the best one is at the top."""
    rows = sorted(((loss, run) for run, loss in points if panel in figures_of(run)), key=lambda row: -row[0])
    for place, (loss, run) in enumerate(rows):
        axes.plot(loss, place, **_look(run.routing, run.protocol))
        left = loss < (rows[0][0] + rows[-1][0]) / 2
        side = {"xytext": (9 if left else -9, 0), "ha": "left" if left else "right", "va": "center", "fontsize": 11}
        axes.annotate(_title(run.routing, run.protocol), (loss, place), textcoords="offset points", **side)
    axes.set_yticks([])
    axes.margins(x=0.25)


def _draw_panel(axes: Any, panel: str, points: Points) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    lines = _lines(points, panel)
    for (routing, protocol, granularity), line in lines.items():
        look = _look(routing, protocol) | {"label": _title(routing, protocol)}
        axes.plot(*zip(*line, strict=True), clip_on=False, zorder=3, **look)
        if granularity > WHOLE:
            axes.annotate(f"G = {granularity}", line[-1], (4, 4), textcoords="offset points", fontsize=11)
    if panel != "size":
        axes.set_xscale("log" if panel not in AXES or AXES[panel].is_log else "linear")
    if panel in ("experts", "granularity"):  # dense models are lines: they have no such axis
        for run, loss in points:
            if run.routing == "dense" and run.size == BASE_SIZE and not run.axis:
                label = f"dense x {run.expansion}" if run.expansion > 1 else "dense"
                axes.axhline(loss, color=routing_color("dense"), linestyle="--", linewidth=1.8)
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                axes.text(1, loss, label, fontsize=11, color=routing_color("dense"), **place)
    axes.margins(y=0.1)
    ticks = sorted({x for line in lines.values() for x, _ in line})
    axes.set_xticks(ticks, [SIZES[int(tick)].upper() if panel == "size" else f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
