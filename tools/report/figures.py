"""The figures: each lays all runs over each other, in a colour each; a heat map is of one run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
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

from ..quickstart.picture import FIRST_SHARE, smooth
from .reading import Run

# After Okabe and Ito; none vanishes on white or on black. When they are used up, they come again with the next dash.
COLOURS = ("#2E8BC9", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C7AE6")
DASHES = ("solid", "dashed", "dotted", "dotdash")
POINTS, POINTS_OF_LAYERS = 1000, 200  # of a curve, at most
CELLS, COLUMNS = 100_000, 240  # of a heat map, at most
Curve = tuple[Sequence[int], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """A figure with its heading; `run` where it is of one run alone."""

    title: str
    note: str
    plot: figure
    run: str = ""


def colour(place: int) -> str:
    """Of the run at this place of the list."""
    return COLOURS[place % len(COLOURS)]


def thin(curve: Curve, most: int) -> Curve:
    """At most so many points: the lowest and the highest of each stretch, so that no spike is lost."""
    iterations, values = curve
    if len(values) <= most:
        return curve
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(values)), most // 2):
        of_stretch = np.asarray(values)[stretch]
        kept += sorted({int(stretch[of_stretch.argmin()]), int(stretch[of_stretch.argmax()])})
    return [iterations[place] for place in kept], [values[place] for place in kept]


class Overlay:
    """One figure for all runs over the iterations, which all figures share."""

    def __init__(self, x_range: Range1d, unit: str, **settings: Any) -> None:
        self.plot = _figure(x_range, unit, **settings)
        self.unit = unit

    def curve(self, place: int, run: Run, curve: Curve, faint: bool = False) -> None:
        """The line of a run."""
        if not curve[0]:
            return
        iterations, values = thin(curve, POINTS)
        dash = DASHES[place // len(COLOURS) % len(DASHES)]
        style: dict[str, Any] = {"color": colour(place), "line_dash": dash, "name": run.name}
        style |= {"alpha": 0.3, "width": 1} if faint else {"width": 2}
        line = self.plot.line(_array(iterations), _array(values), **style)
        if not faint:
            self._tell(line)

    def points(self, place: int, run: Run, curve: Curve, marker: str) -> None:
        """Single values of a run."""
        if curve[0]:
            style = {"color": colour(place), "size": 9, "marker": marker, "line_color": "white", "name": run.name}
            if marker == "diamond":  # on the curve, in its colour
                style |= {"size": 16, "line_color": "#888888", "line_width": 2}
            self._tell(self.plot.scatter(_array(curve[0]), _array(curve[1]), **style))

    def layers(self, place: int, run: Run, layers: Mapping[int, Curve]) -> None:
        """A thin line for each layer of a run."""
        if layers:
            thinned = [thin(curve, POINTS_OF_LAYERS) for curve in layers.values()]
            source = {
                "xs": [_array(iterations) for iterations, _ in thinned],
                "ys": [_array(values) for _, values in thinned],
                "layer": list(layers),
            }
            lines = self.plot.multi_line("xs", "ys", source=source, color=colour(place), alpha=0.6, name=run.name)
            tips = [("", "$name"), ("layer", "@layer"), ("iteration", "$x{0,0}"), (self.unit, "$y{0.0000}")]
            self.plot.add_tools(HoverTool(renderers=[lines], tooltips=tips, line_policy="interp"))

    def level(self, value: float) -> None:
        """A target, for all runs."""
        self.plot.add_layout(Span(location=value, dimension="width", line_dash="dashed", line_color="#888888"))

    def panel(self, title: str, note: str = "") -> Iterator[Panel]:
        """The figure, if anything is drawn in it."""
        if self.plot.renderers:
            yield Panel(title, note, self.plot)

    def _tell(self, glyphs: Any) -> None:
        tips, formats = [("", "$name"), ("iteration", "@x{0,0}"), (self.unit, "@y{%.5g}")], {"@y": "printf"}
        self.plot.add_tools(HoverTool(renderers=[glyphs], tooltips=tips, formatters=formats, mode="vline"))


def panels(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Section of the page → its figures, without those that have nothing to show."""
    x_range = Range1d(0, max(run.last for run in runs) * 1.01 or 1)
    sections = {
        "Loss": [*_losses(runs, x_range)],
        "Optimization": [
            *_simple(runs, x_range, "learning_rate", "Learning rate", form="%.1e"),
            *_simple(runs, x_range, "grad_norm", "Gradient norm", "before it is clipped"),
            *_simple(runs, x_range, "tokens_per_second", "Throughput", "tokens per second, of all processes", "%.0f"),
        ],
        "Routing": [
            *_sparsity(runs, x_range),
            *_experts(runs, x_range),
            *_simple(runs, x_range, "l1_coefficient", "λ", "coefficient of the L1 term", y_axis_type="log"),
            *_l1_losses(runs, x_range),
            *_flips(runs, x_range),
            *_guarded(runs, x_range),
        ],
        "Load of the experts": [panel for run in runs for panel in _load(run, x_range)],
    }
    return {title: found for title, found in sections.items() if found}


def _array(values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def _figure(x_range: Range1d, unit: str, **settings: Any) -> figure:
    settings = {"height": 270, "tools": "box_zoom,pan,wheel_zoom,reset,save", "active_drag": "box_zoom"} | settings
    plot = figure(x_range=x_range, sizing_mode="stretch_width", x_axis_label="iteration", y_axis_label=unit, **settings)
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return plot


def _simple(
    runs: Sequence[Run], x_range: Range1d, key: str, title: str, note: str = "", form: str = "", **settings: Any
) -> Iterator[Panel]:
    overlay = Overlay(x_range, title, **settings)
    if form:
        overlay.plot.yaxis.formatter = PrintfTickFormatter(format=form)
    for place, run in enumerate(runs):
        overlay.curve(place, run, run.series(key))
    yield from overlay.panel(title, note)


def _losses(runs: Sequence[Run], x_range: Range1d) -> Iterator[Panel]:
    first = FIRST_SHARE * x_range.end
    training = Overlay(x_range, "nats per token")
    shown: list[float] = []
    for place, run in enumerate(runs):
        iterations, values = run.series("lm_loss")
        smoothed = smooth(values)
        training.curve(place, run, (iterations, values), faint=True)
        training.curve(place, run, (iterations, smoothed))
        shown += [value for at, value in zip(iterations, smoothed, strict=True) if at >= first] or values
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) or 0.1
        training.plot.y_range = Range1d(min(shown) - margin, max(shown) + margin)
    yield from training.panel("Training", "smoothed; faint: as logged. Zoom out for the first steps")
    several = (name for run in runs for name, losses in run.validation.items() if len(losses) > 1)
    for name in dict.fromkeys(several):  # the summary has those that were measured once
        validation = Overlay(x_range, "nats per token")
        for place, run in enumerate(runs):
            found = sorted(run.validation.get(name, {}).items())
            curve = [at for at, _ in found], [loss for _, loss in found]
            validation.curve(place, run, curve)
            validation.points(place, run, curve, "circle")
        yield from validation.panel(f"Validation {name}".strip())


def _sparsity(runs: Sequence[Run], x_range: Range1d) -> Iterator[Panel]:
    overlay = Overlay(x_range, "S")
    for place, run in enumerate(runs):
        overlay.layers(place, run, run.layers("layer_sparsity"))
        overlay.curve(place, run, run.series("sparsity"))
        if settled := run.settled:
            overlay.points(place, run, ([settled], [run.rows[settled]["sparsity"]]), "diamond")
    for target in {run.target for run in runs if run.target is not None}:
        overlay.level(target)
    note = "share of token–expert pairs that are off; thin: layers, dashed: target, diamond: settled within 1 % of it"
    yield from overlay.panel("Sparsity S", note)


def _experts(runs: Sequence[Run], x_range: Range1d) -> Iterator[Panel]:
    overlay = Overlay(x_range, "experts per token")
    for place, run in enumerate(runs):
        experts = run.num_experts
        layers = {
            layer: (iterations, [experts * (1 - value) for value in values])
            for layer, (iterations, values) in run.layers("layer_sparsity").items()
        }
        overlay.layers(place, run, layers)
        overlay.curve(place, run, run.experts_per_token())
    for topk in {run.topk for run in runs if run.topk}:
        overlay.level(topk)
    yield from overlay.panel("Experts per token", "mean; thin: layers, dashed: k")


def _l1_losses(runs: Sequence[Run], x_range: Range1d) -> Iterator[Panel]:
    overlay = Overlay(x_range, "L1 term")
    for place, run in enumerate(runs):
        overlay.layers(place, run, run.layers("layer_l1_loss"))
        overlay.curve(place, run, run.series("l1_loss"))
    yield from overlay.panel("L1 term", "before λ; thin: layers")


def _flips(runs: Sequence[Run], x_range: Range1d) -> Iterator[Panel]:
    overlay = Overlay(x_range, "share of decisions")
    for place, run in enumerate(runs):
        overlay.curve(place, run, (list(run.flips), [flips["rate"] for flips in run.flips.values()]))
    yield from overlay.panel("Flips", "routing decisions that one update changes")


def _guarded(runs: Sequence[Run], x_range: Range1d) -> Iterator[Panel]:
    overlay = Overlay(x_range, "layer")
    overlay.plot.yaxis.ticker = BasicTicker(min_interval=1)
    for place, run in enumerate(runs):
        found = [(at, layer) for at, layers in zip(*run.series("guarded_layers"), strict=True) for layer in layers]
        overlay.points(place, run, ([at for at, _ in found], [layer for _, layer in found]), "square")
    yield from overlay.panel("Guarded layers", "that routed next to nothing and are pushed up")


def _load(run: Run, x_range: Range1d) -> Iterator[Panel]:
    iterations, tokens = run.series("tokens_per_expert")
    if not iterations:
        return
    layers = sorted(tokens[-1], key=int)
    experts = len(tokens[-1][layers[0]])
    rows = len(layers) * (experts + 1) - 1  # an empty one between two layers
    edges = np.linspace(0, iterations[-1], 1 + min(COLUMNS, len(iterations), CELLS // rows))
    chosen = np.searchsorted(iterations, (edges[1:] + edges[:-1]) / 2)  # a line tells of the iterations before it
    image = np.full((rows, len(chosen)), np.nan, dtype=np.float32)
    for column, place in enumerate(chosen):
        for block, layer in enumerate(layers):
            load = np.asarray(tokens[place][layer], dtype=np.float64)
            image[block * (experts + 1) :][:experts, column] = load / max(load.mean(), 1e-30)
    plot = _figure(x_range, "layer", height=int(np.clip(8 * rows, 200, 900)), y_range=Range1d(rows, 0))
    # Even load stands in the middle of the colours.
    mapper = LinearColorMapper(palette=interp_palette(RdBu[11], 255), low=0, high=2, nan_color="rgba(0, 0, 0, 0)")
    glyph = plot.image([image], x=0, y=0, dw=iterations[-1], dh=rows, color_mapper=mapper, name=run.name)
    ticks = {block * (experts + 1) + experts / 2: layer for block, layer in enumerate(layers)}
    plot.yaxis.ticker, plot.yaxis.major_label_overrides = FixedTicker(ticks=list(ticks)), ticks
    plot.grid.visible = False
    code = "return `${layers[Math.floor(value / rows)]}, ${Math.floor(value) % rows}`"
    place = CustomJSHover(args={"layers": layers, "rows": experts + 1}, code=code)
    tips = [("iteration", "$x{0,0}"), ("layer, expert", "$y{custom}"), ("against an even load", "@image{0.00} times")]
    plot.add_tools(HoverTool(renderers=[glyph], tooltips=tips, formatters={"$y": place}))
    bar = ColorBar(color_mapper=mapper, width=10, ticker=FixedTicker(ticks=[0, 0.5, 1, 1.5, 2]))
    bar.major_label_text_color = "#808a98"  # which it does not take from the page
    plot.add_layout(bar, "right")
    note = "tokens of each expert against the mean of its layer: 1 is even, red is more, blue is less"
    yield Panel(run.name, note, plot, run.name)
