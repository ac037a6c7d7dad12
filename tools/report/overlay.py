"""Draw one figure for all runs: a curve for each, and one tooltip."""

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.models import BoxZoomTool, HoverTool, NumeralTickFormatter, PrintfTickFormatter, Range1d, Span
from bokeh.plotting import figure
from numpy.typing import NDArray

from ..console.picture_style import looks
from ..runs.run_figures import EMPTY, Curve, RunFigures

POINTS, FEW = 1000, 300  # most points of a curve; of a layer's curve, and of the tooltip
RIM = "#888888"  # visible on light and on dark
Layers = Mapping[int, Curve]


@dataclass(frozen=True)
class Panel:
    """A figure with its heading; `run` is set if it shows only that run."""

    title: str
    note: str
    plot: figure
    run: str = ""


@dataclass(frozen=True)
class Drawn:
    """A run in a figure: its curve, thin ones of its layers, a faint one, and single values as marks."""

    curve: Curve = EMPTY
    layers: Layers = field(default_factory=dict)
    faint: Curve = EMPTY
    marks: Curve = EMPTY


def overlay(
    runs: Sequence[RunFigures],
    x_range: Range1d,
    draw: Callable[[RunFigures], Drawn],
    title: str,
    note: str = "",
    unit: str = "",
    form: str = ".5g",
    axis: str = "",
    marker: str = "circle",
    find_level: Callable[[RunFigures], float | None] = lambda _: None,
    **settings: Any,
) -> Iterator[Panel]:
    """Yield one figure for all runs, if anything is drawn in it.

    Args:
        runs: one color and dash each.
        x_range: iterations, shared by all figures.
        draw: returns the curves of a run.
        title, note: of the panel.
        unit: of the values (default: the title).
        form, axis: format of the values in the tooltip, and (printf's) at the axis.
        marker: of the marks.
        find_level: returns a run's target, a dashed line.
        settings: of Bokeh's figure.
    """
    plot = new_figure(x_range, unit or title, **settings)
    if axis:
        plot.yaxis.formatter = PrintfTickFormatter(format=axis)
    hovered: list[tuple[str, str, Drawn]] = []
    for run, (color, dash) in zip(runs, looks(run.routing for run in runs), strict=True):
        drawn, style = draw(run), {"color": color, "name": run.name}
        if drawn.layers:
            thinned = [thin(curve, FEW) for curve in drawn.layers.values()]
            xs, ys = zip(*thinned, strict=True)
            plot.multi_line(list(xs), list(ys), alpha=0.45, **style)
        for curve, width in ((drawn.faint, {"alpha": 0.3}), (drawn.curve, {"width": 2})):
            if len(curve.values):
                plot.line(*thin(curve, POINTS), line_dash=dash, **style, **width)
        if len(drawn.marks.values):
            plot.scatter(*thin(drawn.marks, POINTS), marker=marker, size=11, line_color=RIM, line_width=2, **style)
        if len(drawn.curve.values):
            hovered.append((run.name, color, drawn))
    for level in {level for run in runs if (level := find_level(run))}:
        plot.add_layout(Span(location=level, dimension="width", line_dash="dashed", line_color=RIM))
    if hovered:
        _add_tooltip(plot, unit or title, form, hovered)
    if plot.renderers:
        yield Panel(title, note, plot)


def _add_tooltip(plot: figure, unit: str, form: str, hovered: Sequence[tuple[str, str, Drawn]]) -> None:
    """Add one tooltip for all runs, on an invisible line: several would cover each other."""
    iterations = np.unique(np.concatenate([thin(drawn.curve, FEW).iterations for _, _, drawn in hovered]))
    if len(iterations) > FEW:
        iterations = iterations[np.linspace(0, len(iterations) - 1, FEW).astype(int)]
    values = np.array([_values_at(drawn.curve, iterations) for _, _, drawn in hovered])
    some = np.isfinite(values)
    means = np.where(some, values / some.sum(axis=0).clip(min=1), 0.0).sum(axis=0)
    source: dict[str, Any] = {"x": iterations, "y": means}
    rows = [("", f"<div>iteration <b>@x{{0,0}}</b> · {_plain(unit)}</div>")]
    for number, (name, color, drawn) in enumerate(hovered):
        texts = ["" if math.isnan(value) else f"{value:{form}}" for value in values[number]]
        if drawn.layers:
            by_layer = {layer: _values_at(curve, iterations) for layer, curve in drawn.layers.items()}
            for place in np.flatnonzero(np.isfinite([*by_layer.values()]).all(axis=0)):
                ends = (end(by_layer, key=lambda layer: by_layer[layer][place]) for end in (min, max))  # noqa: B023
                texts[place] += " · " + " to ".join(f"{by_layer[end][place]:{form}} (layer {end})" for end in ends)
        source[f"run{number}"] = texts
        square = f"<span style='color: {color}'>■</span>"
        rows.append((name, f"<div>{square} {_plain(name)} <b>@run{number}</b></div>"))
    line = plot.line("x", "y", source=source, alpha=0)
    tips = "".join(row for _, row in rows)
    hover = HoverTool(renderers=[line], tooltips=tips, mode="vline", point_policy="follow_mouse")
    hover.tags = rows  # the page leaves out the runs that are hidden
    plot.add_tools(hover)


def thin(curve: Curve, most: int) -> Curve:
    """Return at most `most` points: the lowest and highest of each stretch, so that no spike is lost."""
    count = len(curve.values)
    if count <= most:
        return curve
    kept: list[int] = []
    edges = np.linspace(0, count, most // 2 + 1).astype(int)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        stretch = curve.values[start:end]
        kept += sorted({start + int(stretch.argmin()), start + int(stretch.argmax())})
    return Curve(curve.iterations[kept], curve.values[kept])


def new_figure(x_range: Range1d, unit: str, **settings: Any) -> figure:
    """Return an empty figure, in which a drag zooms the iterations."""
    settings = {"height": 270, "tools": "pan,wheel_zoom,reset,save", "active_drag": None} | settings
    plot = figure(x_range=x_range, sizing_mode="stretch_width", x_axis_label="iteration", y_axis_label=unit, **settings)
    drag = BoxZoomTool(dimensions="width")
    plot.add_tools(drag)
    plot.toolbar.active_drag = drag
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return plot


def _plain(text: str) -> str:
    """Escape a text for a tooltip, in which @, $ and braces have a meaning."""
    return "".join(f"&#{ord(sign)};" if sign in "@${}" else sign for sign in html.escape(text))


def _values_at(curve: Curve, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the newest value at each iteration; NaN before the first and after the last."""
    place = np.searchsorted(curve.iterations, iterations, side="right") - 1
    outside = (place < 0) | (iterations > curve.iterations[-1])
    return np.where(outside, math.nan, curve.values[place])
