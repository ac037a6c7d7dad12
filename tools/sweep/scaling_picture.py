"""Draw the validation loss along each axis, routings side by side."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.palette import routing_color
from ..common.picture_style import MUTED, file_pyplot, style
from .plan import (
    AXES,
    BASE_SIZE,
    COMPARED,
    FEW_EXPERTS,
    FIGURES,
    PROTOCOLS,
    ROUTINGS,
    SIZES,
    WHOLE,
    WIDE,
    Run,
    figures_of,
)

Point = tuple[Run, float]  # a finished run and its validation loss
Line = tuple[str, str, int | None]  # routing, protocol, and granularity on axes that do not vary it

TITLES = {"dense": "dense", "moe": "MoE (top-k)", "remoe": "ReMoE (ReLU)"}
IN_SHORT = {"moe": "MoE", "remoe": "ReMoE"}
MARKERS = {"dense": "D", "moe": "s", "remoe": "o"}
PANELS = {
    "size": ("Size", f"E = {FEW_EXPERTS}, G = {WHOLE}", "size of the launch script"),
    "experts": ("Experts", f"G = {WHOLE}", "number of experts E"),
    "granularity": ("Granularity", f"E = {FEW_EXPERTS}", "granularity G"),
    **{name: (axis.title, f"E = {FEW_EXPERTS}", axis.label) for name, axis in AXES.items()},
    COMPARED: ("Routings", f"E = {FEW_EXPERTS}, G = {WHOLE}", "validation loss (nats per token)"),
}
IN_A_ROW = 5


def draw(path: Path, points: Sequence[Point]) -> None:
    """Write the picture, with a panel for each axis that has more than one value.

    Args:
        path: a .png file.
        points: the finished runs.
    """
    from matplotlib.lines import Line2D

    pyplot, panels = file_pyplot(), _panels(points)
    columns, rows = min(IN_A_ROW, len(panels)), math.ceil(len(panels) / IN_A_ROW)
    with pyplot.rc_context(style(font_size=13, pad=(0.12, 0.1))):
        figure = pyplot.figure(figsize=(5 * max(2, columns), 4.8 * rows), dpi=100, layout="constrained")
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            if panel == COMPARED:
                _draw_compared(axes, points)
            else:
                _draw_panel(axes, panel, points)
                if place % columns == 0:
                    axes.set_ylabel("validation loss (nats per token)")
            title, fixed, label = PANELS[panel]
            axes.set_title(title)
            axes.set_title(fixed, loc="right", fontsize=11, color=MUTED, fontweight="normal")
            axes.set_xlabel(label)
        lines = {line[:2] for name in panels if name != COMPARED for line in _lines(points, name)}
        kinds = sorted(
            {(run.routing, run.protocol) for run, _ in points if run.routing == "dense"} | lines, key=_in_order
        )
        handles = []
        for kind in kinds:
            look = _look(*kind) if kind in lines else {"linestyle": "--"}
            handles.append(Line2D([], [], color=routing_color(kind[0]), linewidth=2, **look))
        if panels != [COMPARED]:
            titles = [_title(*kind) for kind in kinds]
            figure.legend(handles, titles, loc="outside upper center", ncols=min(len(kinds), max(3, columns)))
        figure.savefig(path)
        pyplot.close(figure)


def _position(run: Run, figure: str) -> float:
    if figure == "size":
        return SIZES.index(run.size)
    if figure in AXES:
        return run.value if run.axis else AXES[figure].base
    return float(getattr(run, figure))


def _in_order(kind: tuple[Any, ...]) -> tuple[int, str]:
    return ROUTINGS.index(kind[0]), kind[1]


def _title(routing: str, protocol: str) -> str:
    return f"{IN_SHORT[routing]}, {PROTOCOLS[f'{routing}-{protocol}'].title}" if protocol else TITLES[routing]


def _look(routing: str, protocol: str) -> dict[str, Any]:
    marker = PROTOCOLS[f"{routing}-{protocol}"].marker if protocol else MARKERS[routing]
    return {"marker": marker, "markersize": 12 if marker == "*" else 8, "linestyle": ":" if protocol else "-"}


def _lines(points: Sequence[Point], panel: str) -> dict[Line, list[tuple[float, float]]]:
    """Return the points of each line; single points of axes and protocols only if there is nothing else."""
    lines = defaultdict(list)
    for run, loss in points:
        if panel in figures_of(run):
            kept = run.granularity if panel in AXES else None
            lines[run.routing, run.protocol, kept].append((_position(run, panel), loss))
    drawn = [line for line in lines if len(lines[line]) > 1 or (panel not in AXES and not line[1])]
    return {line: sorted(lines[line]) for line in sorted(drawn or lines, key=_in_order)}


def _panels(points: Sequence[Point]) -> list[str]:
    places = {name: {x for line in _lines(points, name).values() for x, _ in line} for name in (*FIGURES, *AXES)}
    panels = [name for name, values in places.items() if len(values) > 1]
    if any(run.kind in PROTOCOLS and COMPARED in figures_of(run) for run, _ in points):
        panels.append(COMPARED)
    single = [name for name, values in places.items() if values]
    return panels or [name for name in single if name in FIGURES] or single


def _draw_compared(axes: Any, points: Sequence[Point]) -> None:
    """Draw a row for each run at the common point; the best one is at the top."""
    rows = sorted(((loss, run) for run, loss in points if COMPARED in figures_of(run)), key=lambda row: -row[0])
    for place, (loss, run) in enumerate(rows):
        look = _look(run.routing, run.protocol)
        axes.plot(loss, place, color=routing_color(run.routing), markeredgecolor="white", **look)
        left = loss < (rows[0][0] + rows[-1][0]) / 2
        told = _title(run.routing, run.protocol) + (f" x {run.expansion}" if run.expansion > 1 else "")
        side = {"xytext": (9 if left else -9, 0), "ha": "left" if left else "right"}
        axes.annotate(told, (loss, place), textcoords="offset points", va="center", fontsize=11, **side)
    axes.set_yticks([])
    axes.margins(x=0.25)


def _draw_panel(axes: Any, panel: str, points: Sequence[Point]) -> None:
    lines = _lines(points, panel)
    for (routing, protocol, granularity), line in lines.items():
        axes.plot(
            *zip(*line, strict=True), color=routing_color(routing), linewidth=2, markeredgecolor="white", clip_on=False,
            zorder=3, **_look(routing, protocol),
        )  # fmt: skip
        if granularity not in (None, WHOLE):
            axes.annotate(f"G = {granularity}", line[-1], (4, 4), textcoords="offset points", fontsize=11)
    if panel != "size":
        axes.set_xscale("log" if panel not in AXES or AXES[panel].is_log else "linear")
    if panel in ("experts", "granularity"):
        wide = Run(BASE_SIZE, "dense", expansion=WIDE)
        references = {Run(BASE_SIZE, "dense"): "dense"} | ({wide: f"dense x {WIDE}"} if panel == "experts" else {})
        for run, loss in points:
            if run in references:
                axes.axhline(loss, color=routing_color("dense"), linestyle="--", linewidth=1.8)
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
                axes.text(1, loss, references[run], fontsize=11, color=routing_color("dense"), **place)
    axes.margins(y=0.1)
    _set_ticks(axes, sorted({x for line in lines.values() for x, _ in line}), panel)


def _set_ticks(axes: Any, ticks: list[float], panel: str) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    labels = [SIZES[int(tick)].upper() for tick in ticks] if panel == "size" else [f"{tick:g}" for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
