"""Draw the figures of the page: each shows all runs; a heat map shows one run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    ColorBar,
    CustomJSHover,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.palettes import RdBu, interp_palette
from bokeh.plotting import figure

from ..console.picture_style import line_styles
from ..runs.run_figures import EMPTY, TOTALS, Curve, RunFigures, smooth

COLUMNS = 240  # maximum number of columns of a heat map
FIRST_SHARE = 0.05  # share of steps at the start that the loss axis ignores: their fall would hide later differences
POINTS, FEW = 1000, 300  # maximum number of points of a curve, and of a layer's curve
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
class RunCurves:
    """A run in a figure: its curve, thin curves of its layers, and a faint curve."""

    curve: Curve = EMPTY
    layers: Layers = field(default_factory=dict)
    faint: Curve = EMPTY


def panels(runs: Sequence[RunFigures]) -> dict[str, list[Panel]]:
    """Return the figures of each section of the page; those with nothing to show are left out."""
    first, last = min(run.began for run in runs), max(run.last for run in runs)
    x_range = Range1d(first, last + (0.01 * (last - first) or 1))
    draw = partial(overlay, runs, x_range)

    def logged(name: str, title: str, note: str = "", **settings: Any) -> Iterator[Panel]:
        return draw(
            lambda run: RunCurves(run.curve(name), run.layers.get(f"layer_{name}", {})), title, note, **settings
        )

    sets = (name for run in runs for name, losses in run.evaluations.items() if len(losses) > 1)
    pairs = "share of token–expert pairs that are off; thin: layers, dashed: target"
    sections: dict[str, list[Panel]] = {
        "Loss": [
            *draw(
                _training_loss, "Training", "smoothed; faint: as logged. Zoom out for the first steps",
                unit="nats per token", **_range_of_losses(runs, first + FIRST_SHARE * (last - first)),
            ),
            *(
                panel
                for name in dict.fromkeys(sets)  # a loss that was measured once is only in the table
                for panel in draw(partial(_validation, name), f"Validation {name}".strip(), unit="nats per token")
            ),
        ],
        "Optimization": [
            *logged("learning_rate", "Learning rate"),
            *logged("grad_norm", "Gradient norm", "before it is clipped"),
            *logged("tokens_per_second", "Throughput", "tokens per second, of all processes", form="@y{0,0}"),
        ],
        "Routing": [
            *logged("sparsity", "Sparsity S", pairs, unit="S", form="@y{0.0000}",
                    find_level=lambda run: run.target_sparsity),
            *draw(_experts, "Experts per token", "computed, mean; thin: positive gates by layer, dashed: k",
                  form="@y{0.000}",
                  find_level=lambda run: run.topk),
            *logged("l1_coefficient", "λ", "coefficient of the L1 term", y_axis_type="log"),
            *logged("l1_loss", "L1 term", "before λ; thin: layers"),
        ],
        "Load of the experts": [panel for run in runs for panel in _load(run, x_range)],
    }  # fmt: skip
    return {title: section for title, section in sections.items() if section}


def _training_loss(figures: RunFigures) -> RunCurves:
    curve = figures.curve("lm_loss")
    return RunCurves(smooth(curve), faint=curve)


def _range_of_losses(runs: Sequence[RunFigures], first: float) -> dict[str, Range1d]:
    curves = [smooth(run.curve("lm_loss")) for run in runs]
    values = np.concatenate([curve.values[curve.iterations >= first] for curve in curves])
    if not len(values):
        return {}
    margin = 0.05 * float(np.ptp(values)) or 0.1
    return {"y_range": Range1d(float(values.min()) - margin, float(values.max()) + margin)}


def _validation(name: str, figures: RunFigures) -> RunCurves:
    losses = {evaluation.iteration: evaluation.loss for evaluation in figures.evaluations.get(name, ())}
    return RunCurves(Curve(np.array([*losses], np.int64), np.array([*losses.values()])))


def _experts(figures: RunFigures) -> RunCurves:
    # A baseline's router logs only running sums; a run with --load from a different folder logs only S.
    experts, iterations = figures.num_experts, figures.curves.get(TOTALS[0], figures.curve("sparsity")).iterations
    if not experts or not len(iterations):
        return RunCurves()
    layers = figures.layers.get("layer_sparsity", {})
    by_layer = {layer: Curve(curve.iterations, experts * (1 - curve.values)) for layer, curve in layers.items()}
    return RunCurves(Curve(iterations, figures.experts_per_token(iterations)), by_layer)


def _load(run: RunFigures, x_range: Range1d) -> Iterator[Panel]:
    loads, iterations = run.loads, [*run.loads]
    if not iterations:
        return
    layers = [*loads[iterations[-1]]]
    experts = len(loads[iterations[-1]][layers[0]])
    rows = len(layers) * (experts + 1) - 1  # with an empty row between two layers
    edges = np.linspace(run.began, iterations[-1], 1 + min(COLUMNS, len(iterations)))
    chosen = np.searchsorted(iterations, (edges[1:] + edges[:-1]) / 2)  # a log line covers the iterations before it
    blocks = []
    for layer in layers:
        load = np.stack([loads[iterations[place]][layer] for place in chosen], axis=1)  # [experts, columns]
        blocks += [load / load.mean(axis=0).clip(min=1e-30), np.full((1, len(chosen)), np.nan, np.float32)]
    image = np.concatenate(blocks[:-1])
    plot = new_figure(x_range, "layer", height=int(np.clip(8 * rows, 200, 900)), y_range=Range1d(rows, 0))
    # Even load is in the middle of the colors.
    mapper = LinearColorMapper(palette=interp_palette(RdBu[11], 255), low=0, high=2, nan_color="rgba(0, 0, 0, 0)")
    glyph = plot.image([image], x=run.began, y=0, dw=edges[-1] - run.began, dh=rows, color_mapper=mapper, name=run.name)
    ticks = {block * (experts + 1) + experts / 2: str(layer) for block, layer in enumerate(layers)}
    plot.yaxis.ticker, plot.yaxis.major_label_overrides = FixedTicker(ticks=list(ticks)), ticks
    plot.grid.visible = False
    code = "return `${layers[Math.floor(value / rows)]}, ${Math.floor(value) % rows}`"
    row = CustomJSHover(args={"layers": layers, "rows": experts + 1}, code=code)
    tips = [("iteration", "$x{0,0}"), ("layer, expert", "$y{custom}"), ("against an even load", "@image{0.00} times")]
    plot.add_tools(HoverTool(renderers=[glyph], tooltips=tips, formatters={"$y": row}))
    bar = ColorBar(color_mapper=mapper, width=10, ticker=FixedTicker(ticks=[0, 0.5, 1, 1.5, 2]))
    bar.major_label_text_color = "#808a98"  # a bar does not take the color of the page
    plot.add_layout(bar, "right")
    note = "tokens of each expert (ReLU routing: positive gates) over their mean: 1 is even, red is more, blue is less"
    yield Panel(run.name, note, plot, run.name)


def overlay(
    runs: Sequence[RunFigures],
    x_range: Range1d,
    draw: Callable[[RunFigures], RunCurves],
    title: str,
    note: str = "",
    unit: str = "",
    form: str = "@y",
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
        form: of the values in the tooltip, for Bokeh.
        find_level: returns a run's target, a dashed line.
        settings: for Bokeh's `figure`.
    """
    plot = new_figure(x_range, unit or title, **settings)
    curves = []
    for run, (color, dash) in zip(runs, line_styles(run.routing for run in runs), strict=True):
        drawn, style = draw(run), {"color": color, "name": run.name}
        if drawn.layers:
            thinned = [thin(curve, FEW) for curve in drawn.layers.values()]
            xs, ys = zip(*thinned, strict=True)
            plot.multi_line(list(xs), list(ys), alpha=0.45, **style)
        if len(drawn.faint.values):
            plot.line(*thin(drawn.faint, POINTS), line_dash=dash, alpha=0.3, **style)
        if len(drawn.curve.values):
            curves.append(plot.line(*thin(drawn.curve, POINTS), line_dash=dash, width=2, **style))
    for level in {level for run in runs if (level := find_level(run))}:
        plot.add_layout(Span(location=level, dimension="width", line_dash="dashed", line_color=RIM))
    tips = [("run", "$name"), ("iteration", "@x{0,0}"), (unit or title, form)]
    plot.add_tools(HoverTool(renderers=curves, tooltips=tips))
    if plot.renderers:
        yield Panel(title, note, plot)


def thin(curve: Curve, limit: int) -> Curve:
    """Return at most `limit` points: the lowest and highest of each stretch, so that no spike is lost."""
    count = len(curve.values)
    if count <= limit:
        return curve
    kept: list[int] = []
    edges = np.linspace(0, count, limit // 2 + 1).astype(int)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        stretch = curve.values[start:end]
        kept += sorted({start + int(stretch.argmin()), start + int(stretch.argmax())})
    return Curve(curve.iterations[kept], curve.values[kept])


def new_figure(x_range: Range1d, unit: str, **settings: Any) -> figure:
    """Return an empty figure; dragging in it zooms the axis of iterations."""
    settings = {"height": 270, "tools": "pan,wheel_zoom,reset,save", "active_drag": None} | settings
    plot = figure(x_range=x_range, sizing_mode="stretch_width", x_axis_label="iteration", y_axis_label=unit, **settings)
    drag = BoxZoomTool(dimensions="width")
    plot.add_tools(drag)
    plot.toolbar.active_drag = drag
    plot.toolbar.logo, plot.toolbar.autohide = None, True
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    return plot
