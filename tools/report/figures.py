"""The figures of the page: each shows all runs; a heat map shows one."""

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    BoxZoomTool,
    ColorBar,
    CustomJSHover,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
    Span,
)
from bokeh.palettes import RdBu, interp_palette
from bokeh.plotting import figure
from numpy.typing import NDArray

from ..common.picture_style import looks
from ..common.run_figures import Curve
from .reading import Run

POINTS, POINTS_OF_LAYERS, HOVERED = 1000, 200, 400  # of a curve, at most; those that tell their values
CELLS, COLUMNS = 100_000, 240  # of a heat map, at most
FIRST_SHARE = 0.05  # of the training that sets no limits to the axis of losses: its fall would hide the differences
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
        self.plot = _figure(x_range, unit, **settings)
        self._unit, self._form = unit, form
        self._looks = dict(zip((run.name for run in runs), looks(run.figures.routing for run in runs), strict=True))
        self._told: dict[str, tuple[Curve, Layers]] = {}

    def curve(self, run: Run, curve: Curve, faint: bool = False, layers: Layers | None = None) -> None:
        """Draw the line of a run, and a thin one for each of its layers."""
        colour, dash = self._looks[run.name]
        if layers:
            thinned = [thin(of_layer, POINTS_OF_LAYERS) for of_layer in layers.values()]
            lines = {"xs": [each.iterations for each in thinned], "ys": [_float32(each.values) for each in thinned]}
            self.plot.multi_line("xs", "ys", source=lines, color=colour, alpha=0.45, name=run.name)
        if len(curve.values):
            drawn = thin(curve, POINTS)
            width = {"alpha": 0.3, "width": 1} if faint else {"width": 2}
            self.plot.line(
                drawn.iterations, _float32(drawn.values), color=colour, line_dash=dash, name=run.name, **width
            )
            if not faint:
                self._told[run.name] = (curve, layers or {})

    def marks(self, run: Run, curve: Curve, marker: str) -> None:
        """Draw single values of a run, as marks with a rim that is seen on light and on dark."""
        if len(curve.values):
            drawn, colour = thin(curve, POINTS), self._looks[run.name][0]
            style = {"color": colour, "line_color": "#888888", "name": run.name, "marker": marker}
            size = {"size": 16, "line_width": 2} if marker == "diamond" else {"size": 8}
            self.plot.scatter(drawn.iterations, _float32(drawn.values), **style, **size)

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
        source: dict[str, Any] = {"x": iterations, "y": _float32(means)}
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


def panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Return the figures of each section of the page; those with nothing to show are left out."""
    x_range = Range1d(0, max(run.figures.last for run in runs) * 1.01 or 1)

    def overlay(unit: str, **settings: Any) -> Overlay:
        return Overlay(runs, x_range, unit, **settings)

    def simple(name: str, title: str, note: str = "", axis: str = "", **settings: Any) -> Iterator[Panel]:
        shown = overlay(title, **settings)
        if axis:
            shown.plot.yaxis.formatter = PrintfTickFormatter(format=axis)
        for run in runs:
            curve = run.figures.curve(name)
            positive = curve.values > 0
            is_log = settings.get("y_axis_type") == "log"
            shown.curve(run, Curve(curve.iterations[positive], curve.values[positive]) if is_log else curve)
        yield from shown.panel(title, note)

    sections = {
        "Loss": [*_training(runs, overlay("nats per token")), *_validation(runs, overlay)],
        "Optimization": [
            *simple("learning_rate", "Learning rate", axis="%.1e"),
            *simple("grad_norm", "Gradient norm", "before it is clipped"),
            *simple("tokens_per_second", "Throughput", "tokens per second, of all processes", "%.0f", form=",.0f"),
        ],
        "Routing": [
            *_sparsity(runs, overlay("S", form=".4f")),
            *_experts(runs, overlay("experts per token", form=".3f")),
            *simple("l1_coefficient", "λ", "coefficient of the L1 term", y_axis_type="log"),
            *_l1_losses(runs, overlay("L1 term")),
            *simple("flip_rate", "Flips", "share of routing decisions that one update changes"),
            *_guarded(runs, overlay("layer")),
        ],
        "Load of the experts": [panel for run in runs for panel in _load(run, x_range)],
    }
    return {title: found for title, found in sections.items() if found}


def _plain(text: str) -> str:
    """Return a text as HTML in which a tooltip replaces nothing."""
    return "".join(f"&#{ord(sign)};" if sign in "@${}" else sign for sign in html.escape(text))


def _float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.clip(-LARGEST, LARGEST).astype(np.float32)


def _values_at(curve: Curve, iterations: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the last values so far; NaN before the first and after the last."""
    place = np.searchsorted(curve.iterations, iterations, side="right") - 1
    outside = (place < 0) | (iterations > curve.iterations[-1])
    return np.where(outside, math.nan, curve.values[place])


def _figure(x_range: Range1d, unit: str, **settings: Any) -> figure:
    settings = {"height": 270, "tools": "pan,wheel_zoom,reset,save", "active_drag": None} | settings
    plot = figure(x_range=x_range, sizing_mode="stretch_width", x_axis_label="iteration", y_axis_label=unit, **settings)
    drag = BoxZoomTool(dimensions="width")
    plot.add_tools(drag)
    plot.toolbar.active_drag = drag
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return plot


def _training(runs: Sequence[Run], shown: Overlay) -> Iterator[Panel]:
    first = FIRST_SHARE * shown.plot.x_range.end
    limits: list[float] = []
    for run in runs:
        curve = run.figures.curve("lm_loss")
        if len(curve.values):
            smoothed = smooth(curve)
            shown.curve(run, curve, faint=True)
            shown.curve(run, smoothed)
            late = smoothed.values[curve.iterations >= first] if curve.iterations[-1] >= first else curve.values
            limits += [float(late.min()), float(late.max())]
    if limits:
        low, high = max(min(limits), -LARGEST), min(max(limits), LARGEST)
        margin = 0.05 * (high - low) or 0.1
        shown.plot.y_range = Range1d(low - margin, high + margin)
    yield from shown.panel("Training", "smoothed; faint: as logged. Zoom out for the first steps")


def _validation(runs: Sequence[Run], overlay: Any) -> Iterator[Panel]:
    several = (name for run in runs for name, found in run.figures.evaluations.items() if len(found) > 1)
    for name in dict.fromkeys(several):  # the table has those that were measured once
        shown = overlay("nats per token")
        for run in runs:
            # Of two at an iteration the first is of the curve, the second of the training's end.
            losses = {each.iteration: each.loss for each in reversed(run.figures.evaluations.get(name, ()))}
            at = np.array(sorted(losses), np.int64)
            curve = Curve(at, np.array([losses[iteration] for iteration in at.tolist()]))
            shown.curve(run, curve)
            shown.marks(run, curve, "circle")
        yield from shown.panel(f"Validation {name}".strip())


def _sparsity(runs: Sequence[Run], shown: Overlay) -> Iterator[Panel]:
    for run in runs:
        shown.curve(run, run.figures.curve("sparsity"), layers=run.figures.layers.get("layer_sparsity"))
        if run.figures.settled:
            at = np.array([run.figures.settled])
            shown.marks(run, Curve(at, run.figures.at("sparsity", at)), "diamond")
    shown.levels(run.figures.target for run in runs)
    note = "share of token–expert pairs that are off; thin: layers, dashed: target, diamond: settled within 1 % of it"
    yield from shown.panel("Sparsity S", note)


def _experts(runs: Sequence[Run], shown: Overlay) -> Iterator[Panel]:
    for run in runs:
        experts, iterations = run.figures.num_experts, run.figures.curve("sparsity").iterations
        if experts and len(iterations):
            layers = {
                layer: Curve(curve.iterations, experts * (1 - curve.values))
                for layer, curve in run.figures.layers.get("layer_sparsity", {}).items()
            }
            shown.curve(run, Curve(iterations, run.figures.experts_per_token(iterations)), layers=layers)
    shown.levels(run.figures.topk for run in runs)
    yield from shown.panel("Experts per token", "mean; thin: layers, dashed: k")


def _l1_losses(runs: Sequence[Run], shown: Overlay) -> Iterator[Panel]:
    for run in runs:
        shown.curve(run, run.figures.curve("l1_loss"), layers=run.figures.layers.get("layer_l1_loss"))
    yield from shown.panel("L1 term", "before λ; thin: layers")


def _guarded(runs: Sequence[Run], shown: Overlay) -> Iterator[Panel]:
    shown.plot.yaxis.ticker = BasicTicker(min_interval=1)
    for run in runs:
        found = [(at, layer) for at, layers in run.figures.guarded.items() for layer in layers]
        at, layers = np.array(found, np.int64).reshape(-1, 2).T
        shown.marks(run, Curve(at, layers.astype(float)), "square")
    yield from shown.panel("Guarded layers", "that routed next to nothing and are pushed up")


def _load(run: Run, x_range: Range1d) -> Iterator[Panel]:
    loads = run.figures.loads
    iterations = list(loads)
    layers = list(loads[iterations[-1]]) if iterations else []
    experts = len(loads[iterations[-1]][layers[0]]) if layers else 0
    rows = len(layers) * (experts + 1) - 1  # an empty one between two layers
    if not iterations or not 0 < rows <= CELLS:
        return
    edges = np.linspace(0, iterations[-1], 1 + min(COLUMNS, len(iterations), CELLS // rows))
    chosen = np.searchsorted(iterations, (edges[1:] + edges[:-1]) / 2)  # a line stands for the iterations before it
    image = np.full((rows, len(chosen)), np.nan, dtype=np.float32)
    for column, place in enumerate(chosen):
        for block, layer in enumerate(layers):
            load = np.asarray(loads[iterations[place]].get(layer, ()))
            if len(load) == experts:
                image[block * (experts + 1) :][:experts, column] = _float32(load / max(load.mean(), 1e-30))
    plot = _figure(x_range, "layer", height=int(np.clip(8 * rows, 200, 900)), y_range=Range1d(rows, 0))
    # Even load is in the middle of the colours.
    mapper = LinearColorMapper(palette=interp_palette(RdBu[11], 255), low=0, high=2, nan_color="rgba(0, 0, 0, 0)")
    glyph = plot.image([image], x=0, y=0, dw=iterations[-1], dh=rows, color_mapper=mapper, name=run.name)
    ticks = {block * (experts + 1) + experts / 2: str(layer) for block, layer in enumerate(layers)}
    plot.yaxis.ticker, plot.yaxis.major_label_overrides = FixedTicker(ticks=list(ticks)), ticks
    plot.grid.visible = False
    code = "return `${layers[Math.floor(value / rows)]}, ${Math.floor(value) % rows}`"
    row = CustomJSHover(args={"layers": layers, "rows": experts + 1}, code=code)
    tips = [("iteration", "$x{0,0}"), ("layer, expert", "$y{custom}"), ("against an even load", "@image{0.00} times")]
    plot.add_tools(HoverTool(renderers=[glyph], tooltips=tips, formatters={"$y": row}))
    bar = ColorBar(color_mapper=mapper, width=10, ticker=FixedTicker(ticks=[0, 0.5, 1, 1.5, 2]))
    bar.major_label_text_color = "#808a98"  # a bar does not take the colour of the page
    plot.add_layout(bar, "right")
    note = "tokens of each expert against the mean of its layer: 1 is even, red is more, blue is less"
    yield Panel(run.name, note, plot, run.name)
