"""Set Matplotlib's style, one color for each routing, and dashes for several runs of a routing."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.remoe.files.files import write_atomically

# Mostly from Okabe and Ito's palette, which is safe for color-blind readers; visible on white and on black.
ROUTING_COLORS: dict[str, str] = {
    "dense": "#777777",
    "topk": "#E69F00",
    "remoe": "#0072B2",
    "hash": "#009E73",
    "expert_choice": "#8A5A44",
}
OTHER = "#B39B00"
TARGET, MUTED = "#D55E00", "#555555"  # for lines at a target, and for notes
# Colors for more runs of a routing in one picture; they follow the routing's color in turn.
SHADES = {"dense": ("#A5A5A5", "#8A7968"), "topk": ("#D55E00", "#A07000"), "remoe": ("#56B4E9", "#7A6FD0")}
DASHES = ("solid", "dashed", "dotted", "dotdash")  # Bokeh's names; Matplotlib's pictures use markers instead
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def routing_color(name: str) -> str:
    """Return the color of a routing; routings without a color share one."""
    return ROUTING_COLORS.get(name, OTHER)


def line_styles(routings: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield a color and a dash for each run; the first run of a routing is solid in the routing's color."""
    before = Counter[str]()
    for routing in routings:
        shades = (routing_color(routing), *SHADES.get(routing, ()))
        number = before[routing]
        before[routing] += 1
        yield shades[number % len(shades)], DASHES[number % len(DASHES)]


@contextmanager
def picture(path: Path, font_size: float, pad: tuple[float, float], **settings: Any) -> Iterator[Any]:
    """Yield a Matplotlib figure, and write it at the end of the block.

    Args:
        path: a .png file.
        font_size: in points.
        pad: inches around each panel, horizontal and vertical.
        settings: for `Figure`.
    """
    from matplotlib import rc_context  # slow to import
    from matplotlib.figure import Figure

    padding = {"figure.constrained_layout.w_pad": pad[0], "figure.constrained_layout.h_pad": pad[1]}
    with rc_context({"font.size": font_size} | STYLE | padding):
        figure = Figure(dpi=100, layout="constrained", **settings)
        yield figure
        write_atomically(path, figure.savefig)
