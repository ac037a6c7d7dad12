"""Train models over size, experts, granularity, routings and settings of ReMoE and its baselines, and compare them.

Runs scripts/train_llama_*.sh one after another (--tiny: tiny models, side by side), or submits them as Slurm jobs.
Finished runs are skipped, interrupted ones are resumed. The output folder gets results.json, results.md and
results.png. Data and layout come from the environment, as for these scripts: DATA_DIR or DATA_PATH, VOCAB_FILE,
MERGE_FILE, MODEL, TP, PP, VPP, EP, CP.
"""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console

from ..console.flags import above_zero, whole_number
from ..recipes import tiny
from ..recipes.layout import RecipeError
from ..recipes.models import Training
from ..runs.running import run_tool
from .arms import ARMS, SETTINGS
from .figures import BASE, FIGURES, SIZES, VALUES, make_panel, plan_figure
from .grids import add_options, parse_words, prepare_text, read_rows, train_rounds, write_page
from .jobs import Grid, Job, make_job
from .results import Row, read_folder
from .run import Run, check_flags
from .tables import Line, markdown

NOTE = """
Loss after the last iteration. The size in a name is that of the launch script; flags after -- may change it.
"""


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    parser = argparse.ArgumentParser(
        prog="remoe sweep",
        usage="%(prog)s [options] [-- Megatron flags]",
        description=__doc__,
        epilog="docs/baselines.md has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, "sweep", [tiny.SEED])
    base = f"{BASE.size}, E = {BASE.experts}, G = {BASE.granularity}"
    add = parser.add_argument_group("what to train", f"Each figure varies one thing; the rest is {base}.").add_argument
    text = f"of {', '.join(FIGURES)} (default: the first three)"
    add("--figures", nargs="+", choices=FIGURES, default=[*VALUES], metavar="FIGURE", help=text)
    add("--sizes", nargs="+", choices=SIZES, dest="size", help="for the figure size")
    for name, figure, least, more in (
        ("experts", "experts", 2, ""),
        ("granularities", "granularity", 1, "; if given, also for all figures but the first three"),
    ):
        default = " ".join(map(str, VALUES[figure]))
        text = f"for the figure {figure} (default: {default}){more}"
        add(f"--{name}", nargs="+", type=whole_number(least), dest=figure, metavar="N", help=text)
    for name, setting in SETTINGS.items():
        text = f"for the figure {name}: {setting.label} (default: {' '.join(map('{:g}'.format, setting.values))})"
        add(f"--{name}s", nargs="+", type=above_zero, dest=name, metavar="N", help=text)
    text = "default: the first three; for routing and variable-k all of theirs; for a setting those that have it"
    add("--routings", nargs="+", choices=ARMS, metavar="ROUTING", help=f"of {', '.join(ARMS)} ({text})")
    add = parser.add_argument_group("how to train", "Defaults of launch scripts are the paper's.").add_argument
    text = "train the quickstart's model on the CPU, and two larger ones for the figure size, on its text"
    add("--tiny", action="store_true", help=f"{text}, for {tiny.ITERATIONS} steps")
    text = f"of each run (default: {Training().iterations})"
    add("--train-iters", "--steps", type=whole_number(1), dest="steps", metavar="N", help=text)
    add("--gpus-per-node", type=whole_number(1), default=8, metavar="N", help="(default: %(default)s)")
    text = "sequences that a process takes at once (default: the script's)"
    add("--micro-batch-size", type=whole_number(1), metavar="N", help=text)
    add("--slurm", action="store_true", help="submit each run as a job of scripts/slurm/train.sbatch")
    add("--sbatch-flags", default="", metavar='"FLAGS"', help='for sbatch; write --sbatch-flags="--nodes 2 ..."')
    args = parse_words(parser, words)
    args.steps = args.steps or (tiny.TRAINING if args.tiny else Training()).iterations
    args.processes = args.processes if args.tiny else 1  # one run takes all GPUs
    args.sbatch_flags = shlex.split(args.sbatch_flags)
    if args.slurm and args.tiny:
        parser.error("--slurm with --tiny: tiny models train on this machine. Leave out one of them.")
    if args.sbatch_flags and not args.slurm:
        parser.error("--sbatch-flags without --slurm: nothing is submitted. Add --slurm, or leave it out.")
    for flag in args.sbatch_flags:
        if flag.startswith(("--clusters", "-M")):
            parser.error(f"--sbatch-flags {flag}: jobs of other clusters cannot be followed. Submit from that cluster.")
    return args


def plan_runs(args: argparse.Namespace) -> dict[str, list[tuple[Run, float, str]]]:
    """Return figure → its runs, with their places on its axis.

    Raises:
        RecipeError: there are no runs, or a flag behind -- is one of theirs.
    """
    values = {name: given for name in (*VALUES, *SETTINGS) if (given := getattr(args, name, None)) is not None}
    base = replace(BASE, steps=args.steps, is_tiny=args.tiny, tokens=args.tokens)
    planned = {
        figure: [
            each for seed in args.seeds for each in plan_figure(figure, values, args.routings, replace(base, seed=seed))
        ]
        for figure in args.figures
    }
    if not any(planned.values()):
        given = f"--figures {' '.join(args.figures)} --routings {' '.join(args.routings)}"
        raise RecipeError(
            f"{given}: no such routing has this setting. Choose others, or leave --routings out. moe-post needs k > 1: "
            "--granularities 2."
        )
    check_flags(args.flags, [run for runs in planned.values() for run, *_ in runs])
    return planned


def make_lines(rows: Sequence[Row]) -> list[Line]:
    """Return a line of the table for the finished runs that differ in their seeds only; gaps are from ReMoE."""
    lines: dict[Run, Line] = {}
    for run, result in rows:
        if result is None or result.loss is None:
            continue
        like = Run("remoe", 0, run.steps, run.size, run.experts or BASE.experts, run.granularity, run.topk)
        like = replace(like, is_tiny=run.is_tiny, tokens=run.tokens, is_wsd=run.is_wsd, warmup=run.warmup)
        key = replace(run, seed=0)
        titles, reference = ((each.name.replace("_seed0", ""),) for each in (key, like))
        line = lines.setdefault(key, Line(titles, {}, reference=reference if reference != titles else None))
        line.seeds[run.seed] = vars(result)
    return [*lines.values()]


def sweep(console: Console, args: argparse.Namespace) -> int:
    """Train or submit what is missing, and collect; return the exit code."""

    planned = plan_runs(args)
    runs = [*dict.fromkeys(run for of_figure in planned.values() for run, *_ in of_figure)]

    def show(rows: Sequence[Row]) -> None:
        panels = [make_panel(figure, of_figure, dict(rows)) for figure, of_figure in planned.items()]
        lines = [*markdown(["run"], make_lines(rows), args.margin), NOTE]
        write_page(console, args.output_dir, rows, lines, panels)

    if args.collect or args.results:
        show(read_rows(args, args.output_dir))
        return 0
    text = prepare_text(args, console) if args.tiny else None
    sbatch_flags = args.sbatch_flags if args.slurm else None
    grid = Grid(
        args.output_dir, args.flags, text, gpus_per_node=args.gpus_per_node, micro_batch=args.micro_batch_size,
        sbatch_flags=sbatch_flags,
    )  # fmt: skip

    def rounds() -> Iterator[list[Job]]:
        yield [make_job(run, grid) for run in runs]

    return train_rounds(args, console, grid, rounds(), "sweep", lambda: show(read_folder(args.output_dir, runs)))


def main(arguments: Sequence[str]) -> int:
    """Run the sweep; return the exit code."""
    args = parse_arguments(arguments)
    return run_tool("sweep", lambda: sweep(Console(), args), "stopped. The same command goes on from here")
