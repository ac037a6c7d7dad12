"""How the pictures of runs look."""

from typing import Any

# Okabe and Ito's colours, which stay apart for the colour-blind and, by their lightness, in grey.
COLOURS = {"dense": "#555555", "moe": "#E69F00", "remoe": "#0072B2"}
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


def style(font_size: float, pad: tuple[float, float]) -> dict[Any, Any]:
    """Matplotlib's settings; `pad`: inches around each panel, at its sides and above and below."""
    padding = {"figure.constrained_layout.w_pad": pad[0], "figure.constrained_layout.h_pad": pad[1]}
    return {"font.size": font_size} | STYLE | padding


def file_pyplot() -> Any:
    """Matplotlib's pyplot, which takes a moment to import, for pictures in files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
