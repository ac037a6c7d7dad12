"""Draw the figures of the page: each shows all runs; a heat map shows one."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from bokeh.models import ColorBar, CustomJSHover, FixedTicker, HoverTool, LinearColorMapper, Range1d
from bokeh.palettes import RdBu, interp_palette

from ..runs.run_figures import TOTALS, Curve, RunFigures, smooth
from .overlay import Drawn, Panel, new_figure, overlay

COLUMNS = 240  # most columns of a heat map
FIRST_SHARE = 0.05  # start of a training that does not set the range of the loss axis: its fall hides later differences


def panels(runs: Sequence[RunFigures]) -> dict[str, list[Panel]]:
    """Return the figures of each section of the page; those with nothing to show are left out."""
    x_range = Range1d(0, max(run.last for run in runs) * 1.01 or 1)
    draw = partial(overlay, runs, x_range)

    def logged(name: str, title: str, note: str = "", **settings: Any) -> Iterator[Panel]:
        return draw(lambda run: Drawn(run.curve(name), run.layers.get(f"layer_{name}", {})), title, note, **settings)

    sets = (name for run in runs for name, losses in run.evaluations.items() if len(losses) > 1)
    pairs = "share of token–expert pairs that are off; thin: layers, dashed: target, diamond: settled within 1 % of it"
    sections: dict[str, list[Panel]] = {
        "Loss": [
            *draw(
                _training_loss, "Training", "smoothed; faint: as logged. Zoom out for the first steps",
                unit="nats per token", **_range_of_losses(runs, FIRST_SHARE * x_range.end),
            ),
            *(
                panel
                for name in dict.fromkeys(sets)  # the table has those that were measured once
                for panel in draw(partial(_validation, name), f"Validation {name}".strip(), unit="nats per token")
            ),
        ],
        "Optimization": [
            *logged("learning_rate", "Learning rate", axis="%.1e"),
            *logged("grad_norm", "Gradient norm", "before it is clipped"),
            *logged("tokens_per_second", "Throughput", "tokens per second, of all processes", axis="%.0f",
                    form=",.0f"),
        ],
        "Routing": [
            *draw(_sparsity, "Sparsity S", pairs, "S", ".4f", marker="diamond",
                  find_level=lambda run: run.target_sparsity),
            *draw(_experts, "Experts per token", "mean; thin: layers, dashed: k", form=".3f",
                  find_level=lambda run: run.topk),
            *logged("l1_coefficient", "λ", "coefficient of the L1 term", y_axis_type="log"),
            *logged("l1_loss", "L1 term", "before λ; thin: layers"),
            *logged("flip_rate", "Flips", "share of routing decisions that one update changes; thin: layers"),
            *draw(_guarded, "Guarded layers", "that routed next to nothing and are pushed up", "layer",
                  marker="square"),
        ],
        "Load of the experts": [panel for run in runs for panel in _load(run, x_range)],
    }  # fmt: skip
    return {title: section for title, section in sections.items() if section}


def _training_loss(figures: RunFigures) -> Drawn:
    curve = figures.curve("lm_loss")
    return Drawn(smooth(curve), faint=curve)


def _range_of_losses(runs: Sequence[RunFigures], first: float) -> dict[str, Range1d]:
    late = [curve.values[curve.iterations >= first] for run in runs for curve in [smooth(run.curve("lm_loss"))]]
    values = np.concatenate(late)
    if not len(values):
        return {}
    margin = 0.05 * float(np.ptp(values)) or 0.1
    return {"y_range": Range1d(float(values.min()) - margin, float(values.max()) + margin)}


def _validation(name: str, figures: RunFigures) -> Drawn:
    # Of two at an iteration the first is of the curve, the second of the training's end.
    losses = {each.iteration: each.loss for each in reversed(figures.evaluations.get(name, ()))}
    at = np.array(sorted(losses), np.int64)
    curve = Curve(at, np.array([losses[iteration] for iteration in at.tolist()]))
    return Drawn(curve, marks=curve)


def _sparsity(figures: RunFigures) -> Drawn:
    settled = np.array([figures.settled] if figures.settled else [], np.int64)
    marks = Curve(settled, figures.at("sparsity", settled))
    return Drawn(figures.curve("sparsity"), figures.layers.get("layer_sparsity", {}), marks=marks)


def _experts(figures: RunFigures) -> Drawn:
    # A baseline's router logs running sums alone, the authors' fork S alone.
    experts, iterations = figures.num_experts, figures.curves.get(TOTALS[0], figures.curve("sparsity")).iterations
    if not experts or not len(iterations):
        return Drawn()
    layers = figures.layers.get("layer_sparsity", {})
    by_layer = {
        layer: Curve(curve.iterations, figures.computed_experts(curve.values)) for layer, curve in layers.items()
    }
    return Drawn(Curve(iterations, figures.experts_per_token(iterations)), by_layer)


def _guarded(figures: RunFigures) -> Drawn:
    pairs = [(at, layer) for at, layers in figures.guarded.items() for layer in layers]
    at, layers = np.array(pairs, np.int64).reshape(-1, 2).T
    return Drawn(marks=Curve(at, layers.astype(float)))


def _load(run: RunFigures, x_range: Range1d) -> Iterator[Panel]:
    loads, iterations = run.loads, [*run.loads]
    if not iterations:
        return
    layers = [*loads[iterations[-1]]]
    experts = len(loads[iterations[-1]][layers[0]])
    rows = len(layers) * (experts + 1) - 1  # an empty one between two layers
    edges = np.linspace(0, iterations[-1], 1 + min(COLUMNS, len(iterations)))
    chosen = np.searchsorted(iterations, (edges[1:] + edges[:-1]) / 2)  # a line stands for the iterations before it
    blocks = []
    for layer in layers:
        load = np.stack([loads[iterations[place]][layer] for place in chosen], axis=1)  # [experts, columns]
        blocks += [load / load.mean(axis=0).clip(min=1e-30), np.full((1, len(chosen)), np.nan, np.float32)]
    image = np.concatenate(blocks[:-1])
    plot = new_figure(x_range, "layer", height=int(np.clip(8 * rows, 200, 900)), y_range=Range1d(rows, 0))
    # Even load is in the middle of the colors.
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
    bar.major_label_text_color = "#808a98"  # a bar does not take the color of the page
    plot.add_layout(bar, "right")
    note = "tokens of each expert against the mean of its layer: 1 is even, red is more, blue is less"
    yield Panel(run.name, note, plot, run.name)
