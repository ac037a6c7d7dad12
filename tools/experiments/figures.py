"""List the runs of the paper's figures: each varies one thing and keeps the others at the base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..recipes.models import PAPER
from .arms import ARMS, RATE, SETTINGS
from .pictures import Panel
from .results import Row
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


def plan_figure(figure: str, values: Mapping[str, Sequence[Any]], arms: Sequence[str] | None, base: Run) -> list[Run]:
    """Return the runs of one figure.

    Args:
        figure: one of `FIGURES`.
        values: figure → the values along its axis; given granularities also hold for figures over routings and
            settings.
        arms: the wanted ones; None for `COMPARED`, for all of a figure over routings, and for a setting for those of
            `COMPARED` that have it, or all that have it if none does.
        base: the run whose other fields are kept.
    """
    if figure in VALUES:
        points = [{figure: value} for value in values.get(figure, VALUES[figure])]
        arms = COMPARED if arms is None else arms
    else:
        _, usual, fitting = GROUPS.get(figure) or ("", 1, SETTINGS[figure].arms)
        points = [{"granularity": value} for value in values.get("granularity", (usual,))]
        plain = [arm for arm in fitting if arm in COMPARED and figure in SETTINGS] or fitting
        arms = plain if arms is None else [arm for arm in arms if arm in fitting]
    runs = []
    for point in points:
        for arm in arms:
            run = replace(base, arm=arm, **point)
            if arm == "moe-post" and run.granularity * run.topk == 1:
                continue  # a softmax over k = 1 is constant
            if figure in SETTINGS:
                runs += [run.at(figure, value) for value in values.get(figure, SETTINGS[figure].values)]
            else:
                runs.append(run)
                runs += [replace(run, expansion=WIDE)] if arm == "dense" and figure == "experts" else []
    return runs


def plan_figures(
    figures: Iterable[str], values: Mapping[str, Sequence[Any]], arms: Sequence[str] | None, bases: Sequence[Run]
) -> list[Run]:
    """Return the runs of all figures for each base (one a seed), each once, in the order of training."""
    runs = (run for base in bases for figure in figures for run in plan_figure(figure, values, arms, base))
    return [*dict.fromkeys(runs)]


def make_panels(figures: Iterable[str], rows: Sequence[Row]) -> list[Panel]:
    """Return a panel for each figure that has finished runs; dense models are one point, at the base."""
    panels = []
    for figure in figures:
        lines: dict[tuple[str, str], dict[float, list[float]]] = {}
        ticks: dict[float, str] = {}
        for run, result in rows:
            place = None if result is None or result.loss is None else _place(run, figure)
            if place is None or result is None or result.loss is None:
                continue
            words = f"x {run.expansion}" if run.expansion > 1 else ""
            words += f"G = {run.granularity}" if figure in SETTINGS and run.granularity > 1 else ""
            lines.setdefault((run.arm, words), {}).setdefault(place[0], []).append(result.loss)
            ticks[place[0]] = place[1]
        if lines:
            title = GROUPS[figure][0] if figure in GROUPS else figure.capitalize()
            title, label = (SETTINGS[figure].title, SETTINGS[figure].label) if figure in SETTINGS else (title, "")
            is_log = SETTINGS[figure].is_log if figure in SETTINGS else figure in ("experts", "granularity")
            panels.append(Panel(title, LABELS.get(figure, label), lines, dict(sorted(ticks.items())), is_log))
    return panels


def _place(run: Run, figure: str) -> tuple[float, str] | None:
    """Return a run's place on the axis of a figure and its label; None if it is not in the figure."""
    like = replace(BASE, arm=run.arm, **{name: getattr(run, name) for name in (
        "seed", "steps", "warmup", "is_wsd", "is_tiny", "tokens", "topk", "expansion"
    )})  # fmt: skip
    if figure in VALUES:
        value = getattr(run, figure) or getattr(BASE, figure)
        number = SIZES.index(value) if figure == "size" and value in SIZES else value
        same = replace(run, **{figure: getattr(like, figure)}) == like
        return (float(number), str(value)) if same and not isinstance(number, str) else None
    like = replace(like, granularity=run.granularity)
    if figure in GROUPS:
        _, granularity, arms = GROUPS[figure]
        same = run == like and run.arm in arms and (run.granularity == granularity or run.arm == "dense")
        return (float(arms.index(run.arm)), ARMS[run.arm].title.replace(", ", "\n")) if same else None
    setting = SETTINGS[figure]
    value = run.rate if figure == RATE else run.value if run.setting == figure else setting.base
    is_same = like.at(figure, value) == run and run.arm in setting.arms
    return (float(value), f"{value:g}") if is_same else None
