"""Draw a picture of each analysis from the contents of its .json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ...console.picture_style import MUTED, TARGET, picture, routing_color
from .findings import Numbers

MEASURED, OTHER = routing_color("remoe"), TARGET
# Okabe and Ito's palette, with the two colors above first.
DOMAINS = (MEASURED, OTHER, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
Layers = Mapping[int, Numbers]


def draw(path: Path, name: str, numbers: Numbers) -> None:
    """Write the picture of an analysis to `path`; `name` is a key of `DRAWN`."""
    with picture(path, font_size=11, pad=(0.12, 0.12)) as figure:
        DRAWN[name](figure, numbers)


def _draw_experts_per_token(figure: Any, numbers: Numbers) -> None:
    layers, frequency = numbers["layers"], numbers["by_frequency"]
    figure.set_size_inches(11, _height(layers))
    table, points = figure.subplots(1, 2)
    largest = max(layer["largest"] for layer in layers.values())
    shares = numpy.array([layer["histogram"][: largest + 1] for layer in layers.values()])
    table.set(title="Tokens by their number of experts")
    image = _draw_cells(table, shares, layers, "experts of a token", cmap="Blues", vmin=0)
    figure.colorbar(image, ax=table, label="share")

    x, y = (numpy.array([token[key] for token in frequency["tokens"]]) for key in ("frequency", "experts"))
    points.plot(x, y, "o", color=MEASURED, alpha=0.5, markersize=4, markeredgewidth=0, clip_on=False)
    points.set(title="A token's frequency and its experts", xscale="log", ylim=(0, 1.08 * y.max(initial=1)))
    points.set(xlabel="frequency of the token", ylabel="experts, mean of layers")
    if "slopes" in frequency:
        slope, ends = frequency["slopes"]["mean"]["slope"], numpy.array([x.min(), x.max()])
        line = y.mean() + slope * (numpy.log10(ends) - numpy.log10(x).mean())
        label = f"{slope:+.3f} for each tenfold".replace("-", "\N{MINUS SIGN}")
        points.plot(ends, line, color=OTHER, linewidth=2, label=label)
        _add_legend(points)


def _draw_load(figure: Any, numbers: Numbers) -> None:
    domains, special = numbers["domains"], numbers["specialization"]
    layers = next(iter(domains.values()))["load"]
    columns = min(3, len(domains))
    rows = -(-len(domains) // columns)
    heights = rows * _height(layers, 2.2), _height(layers, 3.4)
    figure.set_size_inches(15 if columns > 1 else 8, sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    grid = above.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, domain) in zip(grid, domains.items(), strict=False):
        shares = numpy.array([*domain["load"].values()])
        axes.set(title=name)
        image = _draw_relative(axes, shares / numbers["even"], layers)
    for axes in grid[len(domains) :]:
        axes.set_axis_off()
    _add_relative_bar(above, image, list(grid), f"1: even ({numbers['even']:.1%})")
    experts, *others = below.subplots(1, 2 if special else 1, squeeze=False)[0]
    by_layer = {
        layer: {name: domain["experts_per_token"][layer] for name, domain in domains.items()} for layer in layers
    }
    _draw_dots(experts, by_layer, [(name, DOMAINS[n % len(DOMAINS)], name) for n, name in enumerate(domains)])
    experts.set(title="Experts per token, by domain", xlabel="experts, mean of tokens")
    if special:
        _draw_dots(others[0], special, [("bits", MEASURED, "")])
        others[0].set(title="Mutual information of expert and domain", xlabel="bits per active pair")
        others[0].set_xlim(0, 1.05 * others[0].get_xlim()[1])


def _draw_balance(figure: Any, numbers: Numbers) -> None:
    layers = numbers["layers"]
    figure.set_size_inches(15, _height(layers))
    panels = figure.subplots(1, 3, width_ratios=(0.7, 0.7, 1.3))
    panels[0].axvline(numbers["target"], color=OTHER, linestyle="--", label=f"target {numbers['target']:.4g}")
    _draw_dots(panels[0], layers, [("sparsity", MEASURED, "layer")])
    panels[0].set(title="Sparsity", xlabel="share of pairs that are off")
    panels[1].axvline(1, color=MUTED, linewidth=1)
    _draw_dots(panels[1], layers, [("imbalance", MEASURED, "")])
    panels[1].set(title="Largest load over even", xlabel="even = 1")
    for axes in panels[:2]:
        axes.margins(x=0.2)
    relative = numpy.array([layer["relative_load"] for layer in layers.values()])
    panels[2].set(title="Load of experts")
    image = _draw_relative(panels[2], relative, layers)
    _add_relative_bar(figure, image, [panels[2]], "relative to even")


DRAWN = {
    "experts_per_token": _draw_experts_per_token,
    "load": _draw_load,
    "balance": _draw_balance,
}


def _height(layers: Mapping[int, Any], least: float = 4.0) -> float:
    """Return the height of a picture in inches."""
    return max(least, 1.4 + 0.32 * len(layers))


def _draw_relative(axes: Any, values: numpy.ndarray, layers: Mapping[int, Any]) -> Any:
    """Draw a heat map of loads relative to even, from 1/4 to 4, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    return _draw_cells(axes, values.clip(1 / 4, 4), layers, "expert", cmap="PuOr_r", norm=LogNorm(1 / 4, 4))


def _add_relative_bar(figure: Any, image: Any, axes: list[Any], label: str) -> None:
    bar = figure.colorbar(image, ax=axes, ticks=[1 / 4, 1 / 2, 1, 2, 4], label=label, shrink=0.8, aspect=30)
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _draw_cells(axes: Any, values: numpy.ndarray, layers: Mapping[int, Any], xlabel: str, **colors: Any) -> Any:
    """Draw a heat map with a row for each layer, and return the image."""
    image = axes.imshow(values, aspect="auto", **colors)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(*_ticks(range(values.shape[1]), 12))
    axes.set_yticks(*_ticks([*layers]))
    axes.set(xlabel=xlabel, ylabel="layer")
    return image


def _draw_dots(axes: Any, layers: Layers, drawn: Sequence[tuple[str, str, str]]) -> None:
    """Draw values of each layer as dots, with the first layer at the top.

    Args:
        axes: Matplotlib's.
        layers: layer → key → value; None is not drawn.
        drawn: key, color and label of each kind of value.
    """
    for number, (key, color, label) in enumerate(drawn):
        values = [numpy.nan if layer[key] is None else layer[key] for layer in layers.values()]
        axes.plot(
            values, range(len(layers)), "os^Dv"[number // len(DOMAINS) % 5], color=color, label=label, clip_on=False
        )
    axes.set_yticks(*_ticks([*layers]))
    axes.set(ylim=(len(layers) - 0.5, -0.5), ylabel="layer")
    if any(label for *_, label in drawn):
        _add_legend(axes)


def _add_legend(axes: Any) -> None:
    """Add a legend below the axes."""
    columns = max(1, min(3, 90 // (6 + max(map(len, axes.get_legend_handles_labels()[1])))))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=3.5, ncols=columns)


def _ticks(labels: Sequence[int], limit: int = 24) -> tuple[Sequence[int], Sequence[int]]:
    """Return at most `limit` places and their labels."""
    step = max(1, -(-len(labels) // limit))
    return range(0, len(labels), step), labels[::step]
