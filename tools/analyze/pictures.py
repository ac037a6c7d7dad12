"""Draw a picture of each analysis from the contents of its .json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron.remoe.data.files import write_aside

from ..common.palette import routing_color
from ..common.picture_style import MUTED, TARGET, file_pyplot, style
from .findings import Numbers

MEASURED, BESIDE = routing_color("remoe"), TARGET
# Okabe and Ito's, those two first.
DOMAINS = (MEASURED, BESIDE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MOST_CELLS = 200  # of a heat map that shows its numbers
Layers = Mapping[int, Numbers]
LEAST_SHARE = 0.0005  # of tokens; smaller cells of a histogram stay empty


def draw(path: Path, name: str, numbers: Numbers) -> None:
    """Write the picture of an analysis, aside and renamed.

    Args:
        path: a .png file.
        name: of the analysis.
        numbers: from `findings`.
    """
    pyplot = file_pyplot()
    with pyplot.rc_context(style(font_size=11, pad=(0.12, 0.12))):
        figure = pyplot.figure(dpi=100, layout="constrained")
        DRAWN[name](figure, numbers)
        write_aside(path, figure.savefig)
        pyplot.close(figure)


def _experts_per_token(figure: Any, numbers: Numbers) -> None:
    layers, frequency = numbers["layers"], numbers["by_frequency"]
    fitted = "slopes" in frequency
    figure.set_size_inches(15 if fitted else 11, _height(len(layers)))
    table, points, *others = figure.subplots(1, 2 + fitted, width_ratios=(1.2, 1.2, 0.8)[: 2 + fitted])
    largest = max(one["largest"] for one in layers.values())
    shares = numpy.array([one["histogram"][: largest + 1] for one in layers.values()])
    image = table.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    marks = [[f"{100 * share:.1f}" if share >= LEAST_SHARE else "" for share in row] for row in shares]
    _cells(table, image, shares, [*layers], marks)
    table.set(title="Tokens by their number of experts, %", xlabel="experts of a token", ylabel="layer")

    tokens = frequency["tokens"]
    points.set(
        title="A token's frequency and its experts", xlabel="frequency of the token", ylabel="experts, mean of layers"
    )
    x, y = (numpy.array([token[key] for token in tokens]) for key in ("frequency", "experts"))
    points.plot(x, y, "o", color=MEASURED, alpha=0.5, markersize=4, markeredgewidth=0, clip_on=False)
    points.set_xscale("log")
    points.set_ylim(0, 1.08 * y.max(initial=1))
    if not fitted:
        return
    mean = frequency["slopes"]["mean"]
    ends = numpy.array([x.min(), x.max()])
    line = y.mean() + mean["slope"] * (numpy.log10(ends) - numpy.log10(x).mean())
    fit = f"{mean['slope']:+.3f} for each tenfold (95 %: {mean['low']:+.3f} to {mean['high']:+.3f})"
    points.plot(ends, line, color=BESIDE, linewidth=2, label=fit.replace("-", "\N{MINUS SIGN}"))
    _legend(points)
    (slopes,) = others
    _intervals(slopes, {layer: frequency["slopes"][layer] for layer in layers}, ("slope", "low", "high"))
    slopes.axvline(0, color=MUTED, linewidth=1)
    slopes.set(title="The same slope by layer", xlabel="experts for each tenfold of frequency", ylabel="layer")


def _load(figure: Any, numbers: Numbers) -> None:
    domains, special = numbers["domains"], numbers["specialization"]
    layers = [*next(iter(domains.values()))["load"]]
    columns = min(3, len(domains))
    rows = -(-len(domains) // columns)
    figure.set_size_inches(15 if columns > 1 else 8, rows * _height(len(layers), 2.2) + 3.4)
    above, below = figure.subfigures(2, 1, height_ratios=(rows * _height(len(layers), 2.2), 3.4))
    grid = above.subplots(rows, columns, squeeze=False).flatten()
    even, image = numbers["even"], None
    for axes, (name, domain) in zip(grid, domains.items(), strict=False):
        shares = numpy.array([domain["load"][layer] for layer in layers])
        image = _relative(axes, shares / even, layers, [[f"{share:.0%}" for share in row] for row in shares])
        axes.set(title=name, xlabel="expert", ylabel="layer")
    for axes in grid[len(domains) :]:
        axes.set_axis_off()
    _relative_bar(above, image, list(grid), f"1: even ({even:.1%})")
    experts, *others = below.subplots(1, 2 if special else 1, squeeze=False)[0]
    for number, (name, domain) in enumerate(domains.items()):
        experts.plot(
            range(len(layers)), [domain["experts_per_token"][layer] for layer in layers], "o-", label=name,
            color=DOMAINS[number % len(DOMAINS)],
        )  # fmt: skip
    _legend(experts)
    _layer_axis(experts, layers)
    experts.set(title="Experts per token, by domain", ylabel="experts, mean of tokens")
    if not special:
        return
    (bits,) = others
    bits.bar(
        range(len(layers)), [special[layer]["bits"] for layer in layers], color=MEASURED, width=0.6, label="measured"
    )
    shuffled = [numpy.nan if (of := special[layer]["shuffled_95"]) is None else of for layer in layers]
    bits.plot(range(len(layers)), shuffled, "D", color=BESIDE, label="shuffled domains, 95 % are below")
    _legend(bits)
    _layer_axis(bits, layers)
    bits.set(title="What an expert tells of the domain", ylabel="mutual information, bits")


def _balance(figure: Any, numbers: Numbers) -> None:
    layers, ranks = numbers["layers"], numbers["expert_parallel"]
    figure.set_size_inches(15 if ranks == 1 else 18, _height(len(layers)))
    panels = figure.subplots(1, 3 + (ranks > 1), width_ratios=(0.7, 0.7, 1.3) + (1.0,) * (ranks > 1))
    panels[0].axvline(numbers["target"], color=BESIDE, linestyle="--", label=f"target {numbers['target']:.4g}")
    _by_layer(panels[0], layers, [("sparsity", "o", MEASURED, "layer")])
    panels[0].set(title="Sparsity", xlabel="share of pairs that are off")
    panels[1].axvline(1, color=MUTED, linewidth=1)
    of_ranks = [("rank_imbalance", "D", BESIDE, f"{ranks} ranks")] * (ranks > 1)
    _by_layer(panels[1], layers, [("imbalance", "o", MEASURED, "experts"), *of_ranks])
    panels[1].set(title="Largest load over even", xlabel="even = 1")
    for axes in panels[:2]:
        axes.margins(x=0.2)
    relative = numpy.array([one["relative_load"] for one in layers.values()])
    marks = [
        ["×" if expert in one["dead"] else f"{load:.2f}" for expert, load in enumerate(one["relative_load"])]
        for one in layers.values()
    ]
    image = _relative(panels[2], relative, [*layers], marks)
    panels[2].set(title="Load of experts (× dead)", xlabel="expert", ylabel="layer")
    if ranks > 1:
        relative = numpy.array([[rank["relative_load"] for rank in one["ranks"]] for one in layers.values()])
        marks = [
            [f"{rank['relative_load']:.2f}" + f"\n{rank['dead']}×" * bool(rank["dead"]) for rank in one["ranks"]]
            for one in layers.values()
        ]
        image = _relative(panels[3], relative, [*layers], marks)
        panels[3].set(title="Load of ranks (n× dead)", xlabel="expert-parallel rank", ylabel="layer")
    _relative_bar(figure, image, list(panels[2:]), "relative to even")


def _neighbours(figure: Any, numbers: Numbers) -> None:
    layers, window = numbers["layers"], numbers["window"]
    figure.set_size_inches(12, _height(len(layers)))
    common, union = figure.subplots(1, 2)
    for axes, key in ((common, "common"), (union, "union")):
        chance, measured = ([one[name] for one in layers.values()] for name in (f"{key}_by_chance", key))
        axes.hlines(range(len(layers)), chance, measured, color="#bbbbbb", linewidth=2, zorder=1)
        _by_layer(axes, layers, [(f"{key}_by_chance", "D", BESIDE, "by chance"), (key, "o", MEASURED, "measured")])
        axes.set_xlim(0, 1.08 * max(chance + measured))
    common.set(title="Experts that the token before has too", xlabel="share of a token's experts")
    common.xaxis.set_major_formatter("{x:.0%}")
    union.set(title=f"Experts of {window} tokens together", xlabel="different experts")


def _gates(figure: Any, numbers: Numbers) -> None:
    layers = {layer: one for layer, one in numbers["layers"].items() if one}
    figure.set_size_inches(12, _height(len(layers)))
    sizes, shares = figure.subplots(1, 2)
    _intervals(sizes, layers, ("median", "percentile_10", "percentile_90"))
    _by_layer(sizes, layers, [("mean", "D", BESIDE, "mean")])
    sizes.set(title="Size of active gates", xlabel="gate: median, 10 % to 90 %")
    sizes.set_xlim(left=0)
    of_tokens = [("largest_gate", "D", BESIDE, "of all its gates"), ("largest_output", "o", MEASURED, "of the output")]
    _by_layer(shares, layers, of_tokens)
    shares.set(title="Share of a token's largest gate", xlabel="mean of tokens with experts")
    shares.set_xlim(0, 1.03)
    shares.xaxis.set_major_formatter("{x:.0%}")


DRAWN = {
    "experts_per_token": _experts_per_token,
    "load": _load,
    "balance": _balance,
    "neighbours": _neighbours,
    "gates": _gates,
}


def _height(layers: int, least: float = 4.0) -> float:
    """Return the height of a picture in inches."""
    return max(least, 1.4 + 0.32 * layers)


def _relative(axes: Any, values: numpy.ndarray, layers: Sequence[int], marks: list[list[str]]) -> Any:
    """Draw a heat map of loads relative to even, from 1/4 to 4, on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    image = axes.imshow(values.clip(1 / 4, 4), cmap="PuOr_r", norm=LogNorm(1 / 4, 4), aspect="auto")
    _cells(axes, image, values, layers, marks)
    return image


def _relative_bar(figure: Any, image: Any, axes: list[Any], label: str) -> None:
    ticks = [1 / 4, 1 / 2, 1, 2, 4]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, label=label, shrink=0.8, aspect=30)
    bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _cells(axes: Any, image: Any, values: numpy.ndarray, layers: Sequence[int], marks: list[list[str]]) -> None:
    """Add ticks to a heat map, and numbers to its cells unless there are too many."""
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(*_ticks(range(values.shape[1]), 12))
    axes.set_yticks(*_ticks(layers))
    few = values.size <= MOST_CELLS
    for row, texts in enumerate(marks):
        for column, text in enumerate(texts):
            if few or text == "×":
                red, green, blue, _ = image.cmap(image.norm(image.get_array()[row, column]))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
                axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "#222222")


def _intervals(axes: Any, layers: Layers, keys: tuple[str, str, str]) -> None:
    """Draw a dot and a line for each layer: the figures of value, low, high."""
    values, low, high = ([one[key] for one in layers.values()] for key in keys)
    axes.hlines(range(len(layers)), low, high, color=MEASURED, linewidth=2)
    axes.plot(values, range(len(layers)), "o", color=MEASURED)
    _layers_down(axes, [*layers])


def _by_layer(axes: Any, layers: Layers, drawn: Sequence[tuple[str, str, str, str]]) -> None:
    """Draw figures of each layer: key, mark, color and label of each; None is left out."""
    for key, mark, color, label in drawn:
        values = [numpy.nan if one[key] is None else one[key] for one in layers.values()]
        axes.plot(values, range(len(layers)), mark, color=color, label=label)
    _layers_down(axes, [*layers])
    _legend(axes)


def _legend(axes: Any) -> None:
    """Add a legend below the axes."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=3.5, ncols=3)


def _layers_down(axes: Any, layers: Sequence[int]) -> None:
    """Put the first layer at the top, as in the heat maps."""
    axes.set_yticks(*_ticks(layers))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_ylabel("layer")


def _layer_axis(axes: Any, layers: Sequence[int]) -> None:
    axes.set_xticks(*_ticks(layers))
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_xlabel("layer")


def _ticks(labels: Sequence[int], most: int = 24) -> tuple[Sequence[int], Sequence[int]]:
    """Return at most `most` places and their labels."""
    step = -(-len(labels) // most)
    return range(0, len(labels), step), labels[::step]
