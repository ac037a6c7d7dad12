"""Draw the figures of the page: each shows all runs; a heat map shows one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColorBar,
    CustomJSHover,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    PrintfTickFormatter,
    Range1d,
)
from bokeh.palettes import RdBu, interp_palette

from ..common.run_figures import Curve
from .overlay import LARGEST, Overlay, Panel, as_float32, new_figure, smooth
from .reading import Run

CELLS, COLUMNS = 100_000, 240  # of a heat map, at most
FIRST_SHARE = 0.05  # of the training that sets no limits to the axis of losses: its fall would hide the differences


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
                image[block * (experts + 1) :][:experts, column] = as_float32(load / max(load.mean(), 1e-30))
    plot = new_figure(x_range, "layer", height=int(np.clip(8 * rows, 200, 900)), y_range=Range1d(rows, 0))
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
