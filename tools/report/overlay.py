"""Draw one figure for all runs: a curve for each, and one tooltip."""

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import BoxZoomTool, HoverTool, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure
from numpy.typing import NDArray

from ..common.picture_style import looks
from ..common.run_figures import Curve
from .reading import Run

POINTS, POINTS_OF_LAYERS, HOVERED = 1000, 200, 400  # of a curve, at most; those that tell their values
SMOOTHED = 0.03  # of a curve, whose mean is drawn at each point
LARGEST = 3e38  # of a float32
Layers = Mapping[int, Curve]


@dataclass(frozen=True)
class Panel:
    """A figure with its heading; `run` is set if it shows only that run."""

    title: str
    note: str
    plot: figure
    run: str = ""


def thin(curve: Curve, most: int) -> Curve:
    """Return at most so many points: the lowest and the highest of each stretch, so that no spike is lost."""
    count = len(curve.values)
    if count <= most:
        return curve
    kept: list[int] = []
    edges = np.linspace(0, count, most // 2 + 1).astype(int)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        stretch = curve.values[start:end]
        kept += sorted({start + int(stretch.argmin()), start + int(stretch.argmax())})
    return Curve(curve.iterations[kept], curve.values[kept])


def smooth(curve: Curve) -> Curve:
    """Return the centred mean over `SMOOTHED` of the points, over fewer at both ends."""
    count = len(curve.values)
    half = max(1, round(count * SMOOTHED / 2))
    sums, places = np.concatenate([[0.0], np.cumsum(curve.values)]), np.arange(count)
    first, end = (places - half).clip(min=0), (places + half + 1).clip(max=count)
    means = (sums[end] - sums[first]) / (end - first)
    return Curve(curve.iterations, np.where(np.isfinite(means), means, curve.values))


class Overlay:
    """One figure with a curve for each run, over the iterations that all figures share."""

    def __init__(self, runs: Sequence[Run], x_range: Range1d, unit: str, form: str = ".5g", **settings: Any) -> None:
        self.plot = new_figure(x_range, unit, **settings)
        self._unit, self._form = unit, form
        self._looks = dict(zip((run.name for run in runs), looks(run.figures.routing for run in runs), strict=True))
        self._told: dict[str, tuple[Curve, Layers]] = {}

    def curve(self, run: Run, curve: Curve, faint: bool = False, layers: Layers | None = None) -> None:
        """Draw the line of a run, and a thin one for each of its layers."""
        colour, dash = self._looks[run.name]
        if layers:
            thinned = [thin(of_layer, POINTS_OF_LAYERS) for of_layer in layers.values()]
            lines = {"xs": [each.iterations for each in thinned], "ys": [as_float32(each.values) for each in thinned]}
            self.plot.multi_line("xs", "ys", source=lines, color=colour, alpha=0.45, name=run.name)
        if len(curve.values):
            drawn = thin(curve, POINTS)
            width = {"alpha": 0.3, "width": 1} if faint else {"width": 2}
            self.plot.line(
                drawn.iterations, as_float32(drawn.values), color=colour, line_dash=dash, name=run.name, **width
            )
            if not faint:
                self._told[run.name] = (curve, layers or {})

    def marks(self, run: Run, curve: Curve, marker: str) -> None:
        """Draw single values of a run, as marks with a rim that is seen on light and on dark."""
        if len(curve.values):
            drawn, colour = thin(curve, POINTS), self._looks[run.name][0]
            style = {"color": colour, "line_color": "#888888", "name": run.name, "marker": marker}
            size = {"size": 16, "line_width": 2} if marker == "diamond" else {"size": 8}
            self.plot.scatter(drawn.iterations, as_float32(drawn.values), **style, **size)

    def levels(self, values: Iterable[float | None]) -> None:
        """Draw targets as dashed lines."""
        for value in {value for value in values if value}:
            self.plot.add_layout(Span(location=value, dimension="width", line_dash="dashed", line_color="#888888"))

    def panel(self, title: str, note: str = "") -> Iterator[Panel]:
        """Yield the figure if anything is drawn in it."""
        if self.plot.renderers:
            self._tell()
            yield Panel(title, note, self.plot)

    def _tell(self) -> None:
        """Add one tooltip for all runs, on an invisible line: several would cover each other."""
        if not self._told:
            return
        thinned = [thin(curve, HOVERED).iterations for curve, _ in self._told.values()]
        iterations = np.unique(np.concatenate(thinned))
        if len(iterations) > HOVERED:
            iterations = iterations[np.linspace(0, len(iterations) - 1, HOVERED).astype(int)]
        values = np.array([_values_at(curve, iterations) for curve, _ in self._told.values()])
        some = np.isfinite(values)
        means = np.where(some, values / some.sum(axis=0).clip(min=1), 0.0).sum(axis=0)
        source: dict[str, Any] = {"x": iterations, "y": as_float32(means)}
        head = f"<div>iteration <b>@x{{0,0}}</b> · {_plain(self._unit)}</div>"
        rows = []
        for number, (name, (_, layers)) in enumerate(self._told.items()):
            source[f"run{number}"] = self._texts(values[number], iterations, layers)
            colour = f"<span style='color: {self._looks[name][0]}'>■</span>"
            rows.append((name, f"<div>{colour} {_plain(name)} <b>@run{number}</b></div>"))
        line = self.plot.line("x", "y", source=source, alpha=0)
        tips = head + "".join(row for _, row in rows)
        hover = HoverTool(renderers=[line], tooltips=tips, mode="vline", point_policy="follow_mouse")
        hover.tags = [("", head), *rows]  # the page leaves out the runs that are hidden
        self.plot.add_tools(hover)

    def _texts(self, values: NDArray[np.float64], iterations: NDArray[np.int64], layers: Layers) -> list[str]:
        texts = ["" if math.isnan(value) else f"{value:{self._form}}" for value in values]
        if not layers:
            return texts
        numbers = list(layers)
        by_layer = np.array([_values_at(curve, iterations) for curve in layers.values()])
        known = np.isfinite(by_layer).all(axis=0)
        lowest, highest = np.where(known, by_layer, 0).argmin(axis=0), np.where(known, by_layer, 0).argmax(axis=0)
        for place in np.flatnonzero(known):
            ends = ((by_layer[end[place], place], numbers[end[place]]) for end in (lowest, highest))
            texts[place] += " · " + " to ".join(f"{value:{self._form}} (layer {layer})" for value, layer in ends)
        return texts


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
    """Return a text as HTML in which a tooltip replaces nothing."""
    return "".join(f"&#{ord(sign)};" if sign in "@${}" else sign for sign in html.escape(text))


def as_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return values for a figure; those that are too large become the largest."""
    return values.clip(-LARGEST, LARGEST).astype(np.float32)


def _values_at(curve: Curve, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the last values so far; NaN before the first and after the last."""
    place = np.searchsorted(curve.iterations, iterations, side="right") - 1
    outside = (place < 0) | (iterations > curve.iterations[-1])
    return np.where(outside, math.nan, curve.values[place])
