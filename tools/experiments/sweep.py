"""Compare models over size, experts, granularity, routings and settings of ReMoE and its baselines.

remoe sweep --figures size > commands    # print a launch script's command for each run of the paper's sizes
remoe sweep --figures size --collect     # tabulate the finished ones
remoe sweep --tiny --figures size        # train tiny models here, and tabulate them

Finished runs are left out, interrupted ones are resumed. The output folder gets results.json, results.md and
results.png. The launch scripts take data and layout from their environment. docs/baselines.md has examples.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..console.flags import above_zero, whole_number
from ..recipes import tiny
from ..recipes.models import PAPER, ROUTINGS, Training
from ..runs.running import run_tool
from .arms import ARMS, SETTINGS
from .grids import grid_parser, parse_words, run_grid, show_finished, write_page
from .pictures import LossPanel, draw
from .results import Results, Row, finished, read_result
from .run import Run
from .script_commands import print_commands
from .tables import Line, markdown

BASE = Run("remoe")
VALUES: Mapping[str, Sequence[Any]] = {
    "size": tuple(PAPER),
    "experts": (4, 8, 16, 32, 64, 128),
    "granularity": (1, 2, 4, 8, 16, 32, 64),
}
WIDE = 8  # the paper's Dense x 8, as wide as 8 experts
# Not in the figure over routings by default. With k = 1, top-p always chooses one expert.
LEFT_OUT = ("moe-topp", "moe-expert-threshold", "moe-normalized", "remoe-layers", "remoe-normalized",
            "remoe-normalized-layers", "remoe-deco")  # fmt: skip
FIGURES = (*VALUES, "routing", *SETTINGS)
FigureRun = tuple[Run, float, str]  # a run, and its position on the figure's axis with the label there


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    parser = grid_parser("sweep", __doc__, [tiny.SEED])
    base = f"{BASE.size}, E = {BASE.experts}, G = {BASE.granularity}"
    add = parser.add_argument_group("runs", f"Each figure varies one setting; the others are {base}.").add_argument
    text = f"of {', '.join(FIGURES)} (default: {' '.join(VALUES)})"
    add("--figures", nargs="+", choices=FIGURES, default=[*VALUES], metavar="FIGURE", help=text)
    add("--sizes", nargs="+", choices=VALUES["size"], dest="size", help="for the figure size")
    text = f"for the figure experts (default: {' '.join(map(str, VALUES['experts']))})"
    add("--experts", nargs="+", type=whole_number(2), metavar="N", help=text)
    text = f"for the figure granularity (default: {' '.join(map(str, VALUES['granularity']))}); if given, also for "
    text += f"all figures but {', '.join(VALUES)}"
    add("--granularities", nargs="+", type=whole_number(1), dest="granularity", metavar="N", help=text)
    for name, setting in SETTINGS.items():
        text = f"for the figure {name}: {setting.label} (default: {' '.join(map('{:g}'.format, setting.values))})"
        add(f"--{name}s", nargs="+", type=above_zero, dest=name, metavar="N", help=text)
    text = f"default: {' '.join(ROUTINGS)}; figure routing: all but {', '.join(LEFT_OUT)}; a setting: those of the "
    text += "default that have it, or all that have it"
    add("--routings", nargs="+", choices=ARMS, metavar="ROUTING", help=f"of {', '.join(ARMS)} ({text})")
    add = parser.add_argument_group("how to train", "Defaults of launch scripts are the paper's.").add_argument
    text = f"of each run (default: {Training().iterations}, or {tiny.TRAINING.iterations} with --tiny)"
    add("--train-iters", type=whole_number(1), dest="steps", metavar="N", help=text)
    text = "of launch scripts (default: %(default)s)"
    add("--gpus-per-node", type=whole_number(1), default=8, metavar="N", help=text)
    text = "sequences per process and micro-batch, of launch scripts (default: the script's)"
    add("--micro-batch-size", type=whole_number(1), metavar="N", help=text)
    add("--tiny", action="store_true", help="train tiny models on the CPU, on the quickstart's text")
    args = parse_words(parser, words)
    for option in ("corpus", "text_dir", "tokens"):
        if not args.tiny and getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} is for tiny models: give --tiny, or set DATA_PATH")
    args.steps = args.steps or (tiny.TRAINING if args.tiny else Training()).iterations
    if not any(list_figure_runs(args).values()):
        given = f"--figures {' '.join(args.figures)} --routings {' '.join(args.routings)}"
        parser.error(f"{given}: no such routing has this setting. Choose others, or leave --routings out.")
    return args


def list_figure_runs(args: argparse.Namespace) -> dict[str, list[FigureRun]]:
    """Return figure → its runs; none if none of the routings has the figure's setting."""
    base = replace(BASE, steps=args.steps, is_tiny=args.tiny, tokens=args.tokens)
    return {
        figure: [each for seed in args.seeds for each in _list_runs(figure, args, replace(base, seed=seed))]
        for figure in args.figures
    }


def _list_runs(figure: str, args: argparse.Namespace, base: Run) -> Iterator[FigureRun]:
    setting = SETTINGS.get(figure)
    fitting = setting.arms if setting else tuple(ARMS)
    usual = [arm for arm in ARMS if arm not in LEFT_OUT] if figure == "routing" else ROUTINGS
    arms = [arm for arm in args.routings or usual if arm in fitting]
    if not arms and not args.routings:
        arms = [*fitting]
    if figure in VALUES:
        for index, value in enumerate(getattr(args, figure) or VALUES[figure]):
            for arm in arms:
                run = replace(base, arm=arm, **{figure: value})
                position = float(index if figure == "size" else value)
                yield run, position, str(value)
                if arm == "dense" and figure == "experts":
                    yield replace(run, expansion=WIDE), position, str(value)
        return
    for granularity in args.granularity or (1,):
        for index, arm in enumerate(arms):
            run = replace(base, arm=arm, granularity=granularity)
            if setting is None:
                yield run, float(index), ARMS[arm].label
            else:
                for value in getattr(args, figure) or setting.values:
                    yield run.vary(figure, value), float(value), f"{value:g}"


def make_panel(figure: str, runs: Iterable[FigureRun], results: Results) -> LossPanel:
    """Return a figure's panel of the runs that have finished."""
    setting = SETTINGS.get(figure)
    lines: dict[tuple[str, str], dict[float, list[float]]] = {}
    ticks: dict[float, str] = {}
    for run, position, label in runs:
        if run in results:
            words = f"x {run.expansion}" if run.expansion > 1 else ""
            words += f"G = {run.granularity}" if figure != "granularity" and run.granularity > 1 else ""
            lines.setdefault((run.arm, words), {}).setdefault(position, []).append(results[run].loss or 0.0)
            ticks[position] = label
    return LossPanel(figure, setting.label if setting else "", lines, ticks, is_log=figure not in ("size", "routing"))


def make_lines(results: Results) -> list[Line]:
    """Return the table's lines: one for all finished runs that differ only in their seeds. Gaps are from ReMoE."""
    lines: dict[Run, Line] = {}
    for run, result in results.items():
        key, experts = replace(run, seed=0), run.experts or BASE.experts
        like = replace(key, arm="remoe", experts=experts, expansion=1, setting="", value=0.0, rate=1.0)
        titles, reference = ((each.name.replace("_seed0", ""),) for each in (key, like))
        line = lines.setdefault(key, Line(titles, {}, reference=reference))
        line.seeds[run.seed] = vars(result)
    return [*lines.values()]


def main(arguments: Sequence[str]) -> int:
    """Train tiny models, print commands of launch scripts, or show results; return the exit code."""
    args = parse_arguments(arguments)
    figures = list_figure_runs(args)
    runs = [*dict.fromkeys(run for figure_runs in figures.values() for run, *_ in figure_runs)]

    def show(rows: Sequence[Row]) -> None:
        results = finished(rows)
        panels = [make_panel(figure, figure_runs, results) for figure, figure_runs in figures.items()]
        drawn = [panel for panel in panels if panel.lines]
        lines = markdown(["run"], make_lines(results))
        picture = partial(draw, panels=drawn, label=f"validation loss (nats per {'byte' if args.tiny else 'token'})")
        write_page(args, rows, [*lines], picture if drawn else None)

    def use_scripts() -> None:
        rows = [(run, result) for run in runs if (result := read_result(args.output_dir / run.name))]
        if args.collect or args.results:
            show_finished(args, rows, show)
        else:
            done = finished(rows)
            print_commands([run for run in runs if run not in done], args)

    return run_grid("sweep", args, lambda: [runs], show) if args.tiny else run_tool("sweep", use_scripts)
