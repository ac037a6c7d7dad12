"""Draw the gap of arms to a reference over FLOPs, with a panel for each number of experts."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from ...console.picture_style import MUTED, looks, picture
from .plan import ARMS, REFERENCE
from .results import Points, differences_of, flops_at

MARKERS = "osD^vPX<>pdh8H*" * 2
APART = 1.025  # factor on the FLOPs from arm to arm, so that seeds do not cover each other
TICKS = (0, 1, 3, 10, 30, 100)  # in margins


def draw(path: Path, points: Mapping[int, Points], margin: float, reference: str = REFERENCE) -> None:
    """Write the picture: at equal FLOPs, each arm's loss minus the reference's; a dot for each seed, and the means.

    Args:
        path: a .png file.
        points: experts → arm → seed → points.
        margin: the largest difference that counts as none; a band, in which the scale is linear.
        reference: the arm at 0.
    """
    from matplotlib.ticker import FixedLocator

    found = {experts: differences_of(of, reference) for experts, of in points.items()}
    arms = [arm for arm in ARMS if any((arm, True) == (key[0], key[2]) for of in found.values() for key in of)]
    routers = {"moe-hash": "hash", "moe-random": "random", "moe-expertchoice": "expert_choice"}
    names = (routers.get(arm, "topk" if ARMS[arm].routing == "moe" else ARMS[arm].routing) for arm in arms)
    look = {arm: (color, marker) for arm, (color, _), marker in zip(arms, looks(names), MARKERS, strict=False)}
    size = max(8.6, 5.3 * len(points)), 5.2
    with picture(path, font_size=13, pad=(0.12, 0.1), figsize=size) as figure:
        panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
        for axes, (experts, of) in zip(panels, points.items(), strict=True):
            axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, linewidth=0)
            axes.axhline(0, color=MUTED, linewidth=1.5, label=ARMS[reference].title)
            for place, arm in enumerate(arms):
                line = {
                    flops_at(of, REFERENCE, steps) * APART ** (place - len(arms) / 2): values
                    for (name, steps, matched), values in sorted(found[experts].items())
                    if (name, matched) == (arm, True)
                }
                color, marker = look[arm]
                means = [*map(fmean, line.values())]
                axes.plot([*line], means, color=color, linewidth=2, marker=marker, markersize=8, label=ARMS[arm].title)
                for flops, values in line.items():
                    axes.plot([flops] * len(values), values, ".", color=color, alpha=0.6)
            lengths = sorted({steps for _, steps, matched in found[experts] if matched})
            ticks = {flops_at(of, REFERENCE, steps): steps for steps in lengths}
            axes.set(title=f"E = {experts}", xscale="log", xlabel="training FLOPs / 10¹² (steps of ReMoE)")
            axes.set_xticks([*ticks], [f"{flops / 1e12:.3g}\n({steps})" for flops, steps in ticks.items()])
            axes.set_xticks([], minor=True)
        panels[0].set_yscale("symlog", linthresh=margin, linscale=0.5)
        panels[0].margins(y=0.08)
        panels[0].yaxis.set_major_locator(FixedLocator([sign * margin * tick for tick in TICKS for sign in (-1, 1)]))
        panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        panels[0].set_ylabel(f"loss minus that of {ARMS[reference].title}\nat equal FLOPs, nats per byte")
        legends = (axes.get_legend_handles_labels() for axes in panels)
        handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
        columns = min(len(handles), len(points) + 1)  # long titles would not fit otherwise
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)
