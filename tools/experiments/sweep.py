"""Train models over size, experts, granularity, routings and settings of ReMoE and its baselines, and compare them.

Runs scripts/train_llama_*.sh one after another (--tiny: tiny models, side by side), or submits them as Slurm jobs.
Finished runs are skipped, interrupted ones are resumed. The output folder gets results.json, results.md and
results.png. As for these scripts, data and layout come from the environment: DATA_DIR or DATA_PATH, VOCAB_FILE,
MERGE_FILE, MODEL, TP, PP, VPP, EP, CP. docs/baselines.md has examples.
"""

import argparse
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..console.flags import above_zero, whole_number
from ..recipes import tiny
from ..recipes.layout import RecipeError
from ..recipes.models import PAPER, ROUTINGS, Training
from .arms import ARMS, SETTINGS
from .grids import grid_parser, parse_words, run_grid, write_page
from .pictures import Panel, draw
from .results import Results, Row, finished
from .run import Run
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
    group = parser.add_argument_group("how to train", "Defaults of launch scripts are the paper's.")
    add = group.add_argument
    text = f"of each run (default: {Training().iterations}, or {tiny.TRAINING.iterations} with --tiny)"
    add("--train-iters", type=whole_number(1), dest="steps", metavar="N", help=text)
    add("--gpus-per-node", type=whole_number(1), default=8, metavar="N", help="(default: %(default)s)")
    text = "sequences per process and micro-batch (default: the script's)"
    add("--micro-batch-size", type=whole_number(1), metavar="N", help=text)
    add = group.add_mutually_exclusive_group().add_argument
    text = "train tiny models on the CPU, on the quickstart's text"
    add("--tiny", action="store_true", default=False, help=text)
    text = 'submit each run as a job of scripts/slurm/train.sbatch, with flags for sbatch: --slurm="--nodes 2"'
    add("--slurm", nargs="?", type=shlex.split, const=[], metavar='"FLAGS"', help=text)
    args = parse_words(parser, words)
    for option in ("corpus", "text_dir", "tokens"):
        if not args.tiny and getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} is for tiny models: give --tiny, or set DATA_PATH")
    args.steps = args.steps or (tiny.TRAINING if args.tiny else Training()).iterations
    args.processes = args.processes if args.tiny else 1  # one run takes all GPUs
    return args


def plan_runs(args: argparse.Namespace) -> dict[str, list[tuple[Run, float, str]]]:
    """Return figure → its runs, each with its place on the figure's axis and the label of that place.

    Raises:
        RecipeError: there are no runs, because none of the routings has the figures' settings.
    """
    base = replace(BASE, steps=args.steps, is_tiny=args.tiny, tokens=args.tokens)
    planned = {
        figure: [each for seed in args.seeds for each in _plan_figure(figure, args, replace(base, seed=seed))]
        for figure in args.figures
    }
    if not any(planned.values()):
        given = f"--figures {' '.join(args.figures)} --routings {' '.join(args.routings)}"
        raise RecipeError(f"{given}: no such routing has this setting. Choose others, or leave --routings out.")
    return planned


def _plan_figure(figure: str, args: argparse.Namespace, base: Run) -> Iterator[tuple[Run, float, str]]:
    setting = SETTINGS.get(figure)
    fitting = setting.arms if setting else tuple(ARMS)
    usual = [arm for arm in ARMS if arm not in LEFT_OUT] if figure == "routing" else ROUTINGS
    arms = [arm for arm in args.routings or usual if arm in fitting]
    if not arms and not args.routings:
        arms = [*fitting]
    if figure in VALUES:
        for place, value in enumerate(getattr(args, figure) or VALUES[figure]):
            for arm in arms:
                run = replace(base, arm=arm, **{figure: value})
                number = float(place if figure == "size" else value)
                yield run, number, str(value)
                if arm == "dense" and figure == "experts":
                    yield replace(run, expansion=WIDE), number, str(value)
        return
    for granularity in args.granularity or (1,):
        for place, arm in enumerate(arms):
            run = replace(base, arm=arm, granularity=granularity)
            if setting is None:
                yield run, float(place), ARMS[arm].label
            else:
                for value in getattr(args, figure) or setting.values:
                    yield run.vary(figure, value), float(value), f"{value:g}"


def make_panel(figure: str, planned: Iterable[tuple[Run, float, str]], results: Results) -> Panel:
    """Return a figure's panel of the planned runs that have finished."""
    setting = SETTINGS.get(figure)
    lines: dict[tuple[str, str], dict[float, list[float]]] = {}
    ticks: dict[float, str] = {}
    for run, place, label in planned:
        if run in results:
            words = f"x {run.expansion}" if run.expansion > 1 else ""
            words += f"G = {run.granularity}" if figure != "granularity" and run.granularity > 1 else ""
            lines.setdefault((run.arm, words), {}).setdefault(place, []).append(results[run].loss or 0.0)
            ticks[place] = label
    return Panel(figure, setting.label if setting else "", lines, ticks, is_log=figure not in ("size", "routing"))


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
    """Run the sweep; return the exit code."""
    args = parse_arguments(arguments)

    def rounds() -> Iterator[list[Run]]:
        yield [*dict.fromkeys(run for planned in plan_runs(args).values() for run, *_ in planned)]

    def show(rows: Sequence[Row]) -> None:
        results = finished(rows)
        panels = [make_panel(figure, planned, results) for figure, planned in plan_runs(args).items()]
        drawn = [panel for panel in panels if panel.lines]
        lines = markdown(["run"], make_lines(results))
        picture = partial(draw, panels=drawn, label=f"validation loss (nats per {'byte' if args.tiny else 'token'})")
        write_page(args, rows, [*lines], picture if drawn else None)

    return run_grid("sweep", args, rounds, show)
