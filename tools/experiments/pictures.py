"""Draw losses or gaps over a setting: a panel for each setting, a line for each arm, a dot for each seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from ..console.picture_style import MUTED, looks, picture
from .arms import ARMS

IN_A_ROW = 5


@dataclass
class Panel:
    """A panel.

    Attributes:
        title, label: of the panel, and of its horizontal axis.
        lines: arm and a note → place on the horizontal axis → values of the seeds.
        ticks: place → label.
        is_log: whether the horizontal axis is logarithmic.
    """

    title: str
    label: str
    lines: Mapping[tuple[str, str], Mapping[float, Sequence[float]]]
    ticks: Mapping[float, str] = field(default_factory=dict)
    is_log: bool = False


def draw(path: Path, panels: Sequence[Panel], label: str, margin: float = 0.0) -> None:
    """Write the picture.

    Args:
        path: a .png file.
        panels: at least one.
        label: of the vertical axis.
        margin: half of a gray band around 0; 0 for none.
    """
    from matplotlib.ticker import NullLocator

    names = [*dict.fromkeys(name for panel in panels for name in panel.lines)]
    routers = (ARMS[arm].router or arm.partition("-")[0] for arm, _ in names)
    colors = {name: color for name, (color, _) in zip(names, looks(routers), strict=True)}
    columns, rows = min(IN_A_ROW, len(panels)), -(-len(panels) // IN_A_ROW)
    with picture(path, font_size=13, pad=(0.12, 0.1), figsize=(5 * max(2, columns), 4.8 * rows)) as figure:
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            if margin:
                axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, linewidth=0)
            for name, line in panel.lines.items():
                points = sorted(line.items())
                title = " ".join(filter(None, (ARMS[name[0]].title, name[1])))
                look = {"color": colors[name], "marker": ARMS[name[0]].marker, "markersize": 8}
                axes.plot([x for x, _ in points], [fmean(seeds) for _, seeds in points], label=title, **look)
                for x, seeds in points:
                    axes.plot([x] * len(seeds), seeds, ".", color=colors[name], alpha=0.6)
            axes.set(title=panel.title, xlabel=panel.label, xscale="log" if panel.is_log else "linear")
            if panel.ticks:
                axes.set_xticks([*panel.ticks], [*panel.ticks.values()])
                axes.xaxis.set_minor_locator(NullLocator())
            if place % columns == 1 or columns == 1:
                axes.set_ylabel(label)
        legends = [axes.get_legend_handles_labels() for axes in figure.axes]
        handles = {title: handle for legend in legends for handle, title in zip(*legend, strict=True)}
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), max(3, columns)))
