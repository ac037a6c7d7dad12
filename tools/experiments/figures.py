"""List the runs of the paper's figures: each varies one thing and keeps the others at the base."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..recipes.models import PAPER
from .arms import ARMS, SETTINGS
from .pictures import Panel
from .results import Result
from .run import Run

SIZES = tuple(PAPER)
VALUES: Mapping[str, Sequence[Any]] = {
    "size": SIZES,
    "experts": (4, 8, 16, 32, 64, 128),
    "granularity": (1, 2, 4, 8, 16, 32, 64),
}
LABELS = {"size": "size of the launch script", "experts": "number of experts E", "granularity": "granularity G"}
BASE = Run("remoe")
WIDE = 8  # the paper's Dense x 8, as wide as 8 experts
COMPARED = ("dense", "moe", "remoe")
# Top-p and expert threshold vary k around 2, and top-p always takes one expert at k = 1.
PAIRED = ("moe-topp", "moe-expert-threshold", "moe-quantile")
# Figures over routings → their title, granularity (and so k), and arms.
GROUPS: Mapping[str, tuple[str, int, Sequence[str]]] = {
    "routing": ("Routings", 1, tuple(arm for arm in ARMS if arm not in (*PAIRED, "moe-post"))),
    "variable-k": ("Varying k", 2, ("moe", "remoe", *PAIRED)),
}
FIGURES = (*VALUES, *GROUPS, *SETTINGS)


def plan_figure(
    figure: str, values: Mapping[str, Sequence[Any]], arms: Sequence[str] | None, base: Run
) -> Iterator[tuple[Run, float, str]]:
    """Yield the runs of one figure, each with its place on the figure's axis and the label there.

    Args:
        figure: one of `FIGURES`.
        values: figure → the values along its axis; given granularities also hold for figures over routings and
            settings.
        arms: the wanted ones; None for `COMPARED`, for all of a figure over routings, and for a setting for those of
            `COMPARED` that have it, or all that have it if none does.
        base: the run whose other fields are kept.
    """
    if figure in VALUES:
        for place, value in enumerate(values.get(figure, VALUES[figure])):
            for arm in COMPARED if arms is None else arms:
                run = replace(base, arm=arm, **{figure: value})
                number = float(place if figure == "size" else value)
                yield run, number, str(value)
                if arm == "dense" and figure == "experts":
                    yield replace(run, expansion=WIDE), number, str(value)
        return
    _, usual, fitting = GROUPS.get(figure) or ("", 1, SETTINGS[figure].arms)
    plain = [arm for arm in fitting if arm in COMPARED and figure in SETTINGS] or fitting
    chosen = plain if arms is None else [arm for arm in arms if arm in fitting]
    for granularity in values.get("granularity", (usual,)):
        for place, arm in enumerate(chosen):
            run = replace(base, arm=arm, granularity=granularity)
            if arm == "moe-post" and run.granularity * run.topk == 1:
                continue  # a softmax over k = 1 is constant
            if figure in GROUPS:
                yield run, float(place), ARMS[arm].title.replace(", ", "\n")
                continue
            for value in values.get(figure, SETTINGS[figure].values):
                yield run.at(figure, value), float(value), f"{value:g}"


def make_panel(figure: str, planned: Iterable[tuple[Run, float, str]], rows: Mapping[Run, Result | None]) -> Panel:
    """Return a figure's panel of the planned runs that have finished."""
    lines: dict[tuple[str, str], dict[float, list[float]]] = {}
    ticks: dict[float, str] = {}
    for run, place, label in planned:
        if (result := rows.get(run)) is not None and result.loss is not None:
            words = f"x {run.expansion}" if run.expansion > 1 else ""
            words += f"G = {run.granularity}" if figure in SETTINGS and run.granularity > 1 else ""
            lines.setdefault((run.arm, words), {}).setdefault(place, []).append(result.loss)
            ticks[place] = label
    if figure in SETTINGS:
        setting = SETTINGS[figure]
        return Panel(setting.title, setting.label, lines, ticks, setting.is_log)
    title = GROUPS[figure][0] if figure in GROUPS else figure.capitalize()
    return Panel(title, LABELS.get(figure, ""), lines, ticks, figure in ("experts", "granularity"))
