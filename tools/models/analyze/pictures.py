"""Draw the experts per token, and the load of the experts by domain, from the contents of their .json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ...console.picture_style import TARGET, picture, routing_color
from .findings import Numbers


def draw_experts_per_token(path: Path, numbers: Numbers) -> None:
    """Draw the share of tokens with each number of experts, and the experts of a token by its frequency."""
    layers, frequency = numbers["layers"], numbers["by_frequency"]
    with picture(path, font_size=11, pad=(0.12, 0.12), figsize=(11, _height(layers))) as figure:
        table, points = figure.subplots(1, 2)
        largest = max(layer["largest"] for layer in layers.values())
        shares = numpy.array([layer["histogram"][: largest + 1] for layer in layers.values()])
        table.set(title="Tokens by their number of experts")
        image = _draw_cells(table, shares, layers, "experts of a token", cmap="Blues", vmin=0)
        figure.colorbar(image, ax=table, label="share")

        x, y = (numpy.array([token[key] for token in frequency["tokens"]]) for key in ("frequency", "experts"))
        points.plot(x, y, "o", color=routing_color("remoe"), alpha=0.5, markersize=4, markeredgewidth=0, clip_on=False)
        points.set(title="A token's frequency and its experts", xscale="log", ylim=(0, 1.08 * y.max(initial=1)))
        points.set(xlabel="frequency of the token", ylabel="experts, mean of layers")
        if "slopes" in frequency:
            slope, ends = frequency["slopes"]["mean"], numpy.array([x.min(), x.max()])
            line = y.mean() + slope * (numpy.log10(ends) - numpy.log10(x).mean())
            label = f"{slope:+.3f} for each tenfold".replace("-", "\N{MINUS SIGN}")
            points.plot(ends, line, color=TARGET, linewidth=2, label=label)
            points.legend()


def draw_load(path: Path, numbers: Numbers) -> None:
    """Draw a heat map for each domain: the load of each expert relative to even, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    domains = numbers["domains"]
    layers = next(iter(domains.values()))["load"]
    columns = min(3, len(domains))
    rows = -(-len(domains) // columns)
    size = 15 if columns > 1 else 8, rows * _height(layers, 2.2)
    with picture(path, font_size=11, pad=(0.12, 0.12), figsize=size) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (name, domain) in zip(grid, domains.items(), strict=False):
            relative = numpy.array([*domain["load"].values()]) / numbers["even"]
            image = _draw_cells(axes, relative.clip(1 / 4, 4), layers, "expert", cmap="PuOr_r", norm=LogNorm(1 / 4, 4))
            axes.set(title=name)
        for axes in grid[len(domains) :]:
            axes.set_axis_off()
        bar = figure.colorbar(image, ax=list(grid), ticks=[1 / 4, 1 / 2, 1, 2, 4], shrink=0.8, aspect=30)
        bar.set_label(f"1: even ({numbers['even']:.1%})")
        bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)


def _height(layers: Mapping[int, Any], least: float = 4.0) -> float:
    """Return the height of a picture in inches."""
    return max(least, 1.4 + 0.32 * len(layers))


def _draw_cells(axes: Any, values: numpy.ndarray, layers: Mapping[int, Any], xlabel: str, **colors: Any) -> Any:
    """Draw a heat map with a row for each layer, and return the image."""
    image = axes.imshow(values, aspect="auto", **colors)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(*_ticks(range(values.shape[1]), 12))
    axes.set_yticks(*_ticks([*layers], 24))
    axes.set(xlabel=xlabel, ylabel="layer")
    return image


def _ticks(labels: Sequence[int], limit: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return at most `limit` positions and their labels."""
    step = max(1, -(-len(labels) // limit))
    return range(0, len(labels), step), labels[::step]
