"""Draw the gap to ReMoE over FLOPs, with a panel for each number of experts."""

import math
from collections.abc import Mapping
from pathlib import Path

from megatron.remoe.data.files import write_aside

from ..common.picture_style import MUTED, file_pyplot, looks, style
from .plan import ARMS, REFERENCE
from .results import Points, flops_at, gaps

MARKERS = "osD^vPX<>pdh8H*" * 2
APART = 1.025  # factor on the FLOPs from arm to arm, so that intervals do not cover each other


def draw(path: Path, points: Mapping[int, Points], margin: float) -> None:
    """Write the picture: at equal FLOPs, each arm's mean loss minus that of ReMoE, with 95 % intervals.

    Args:
        path: a .png file.
        points: experts → arm → seed → points.
        margin: the largest difference that counts as none; a band.
    """
    pyplot, found = file_pyplot(), {experts: gaps(of, margin) for experts, of in points.items()}
    arms = [arm for arm in ARMS if any((arm, True) == (key[0], key[2]) for of in found.values() for key in of)]
    routers = {"moe-hash": "hash", "moe-random": "random", "moe-expertchoice": "expert_choice"}
    names = (routers.get(arm, "topk" if ARMS[arm].routing == "moe" else ARMS[arm].routing) for arm in arms)
    look = {arm: (color, marker) for arm, (color, _), marker in zip(arms, looks(names), MARKERS, strict=False)}
    with pyplot.rc_context(style(font_size=13, pad=(0.12, 0.1))):
        figure = pyplot.figure(figsize=(max(8.6, 5.3 * len(points)), 5.2), dpi=100, layout="constrained")
        panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
        for axes, (experts, of) in zip(panels, points.items(), strict=True):
            axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, linewidth=0)
            axes.axhline(0, color=MUTED, linewidth=1.5)
            for place, arm in enumerate(arms):
                line = [
                    (flops_at(of, REFERENCE, steps) * APART ** (place - len(arms) / 2), each.mean, each.half)
                    for (name, steps, matched), each in sorted(found[experts].items())
                    if (name, matched) == (arm, True)
                ]
                if not line:
                    continue
                x, y, half = zip(*line, strict=True)
                color, marker = look[arm]
                axes.errorbar(
                    x, y, [each if math.isfinite(each) else 0 for each in half], color=color, marker=marker,
                    markersize=8, markeredgecolor="white", linewidth=2, capsize=3, label=ARMS[arm].title,
                )  # fmt: skip
            lengths = sorted({steps for _, steps, _ in found[experts]})
            ticks = {flops_at(of, REFERENCE, steps): steps for steps in lengths}
            axes.set(title=f"E = {experts}", xscale="log", xlabel="training FLOPs / 10¹² (steps of ReMoE)")
            axes.set_xticks([*ticks], [f"{flops / 1e12:.3g}\n({steps})" for flops, steps in ticks.items()])
            axes.set_xticks([], minor=True)
        panels[0].set_ylabel("gap at equal FLOPs, nats per byte")
        legends = (axes.get_legend_handles_labels() for axes in panels)
        handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
        columns = max(2, min(len(handles), 2 * len(points)))
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)
        write_aside(path, figure.savefig)
        pyplot.close(figure)
