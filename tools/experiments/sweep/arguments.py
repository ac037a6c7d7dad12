"""Parse the sweep's command line."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from ...console.flags import above_zero, number_of_cores, split, whole_number
from ...console.places import ROOT
from ...recipes import tiny
from ...recipes.data import is_set
from ...recipes.layout import RecipeError
from ...recipes.models import Training
from ...text.corpora.dataset import CORPORA, MIXED
from . import plan

DESCRIPTION = """\
Train models over size, experts, granularity, routings and settings of ReMoE and its baselines, and compare them.

Runs scripts/train_llama_*.sh one after another (--tiny: side by side), or submits them as Slurm jobs. Finished runs
are skipped, interrupted ones are resumed. The output folder gets a table (results.csv, results.md) and a picture
(results.png). Data and layout come from the environment, as for these scripts: DATA_DIR or DATA_PATH, VOCAB_FILE,
MERGE_FILE, MODEL, TP, PP, VPP, EP, CP.
"""


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose runs; `planned` reads them."""
    figures = (*plan.FIGURES, *plan.GROUPS, *plan.AXES)
    base = f"{plan.BASE_SIZE}, E = {plan.FEW_EXPERTS}, G = {plan.WHOLE}"
    add = parser.add_argument_group("what to train", f"Each figure varies one thing; the rest is {base}.").add_argument
    text = f"of {', '.join(figures)} (default: the first three)"
    add("--figures", nargs="+", choices=figures, default=plan.FIGURES, metavar="FIGURE", help=text)
    add("--sizes", nargs="+", choices=plan.SIZES, dest="size", help="for the figure size")
    for name, figure, least, more in (
        ("experts", "experts", 2, ""),
        ("granularities", "granularity", 1, "; if given, also for all figures but the first three"),
    ):
        default = " ".join(map(str, plan.VALUES[figure]))
        text = f"for the figure {figure} (default: {default}){more}"
        add(f"--{name}", nargs="+", type=whole_number(least), dest=figure, metavar="N", help=text)
    for name, axis in plan.AXES.items():
        text = f"for the figure {name}: {axis.label} (default: {' '.join(f'{number:g}' for number in axis.values)})"
        add(f"--{name}s", nargs="+", type=above_zero, dest=name, metavar="N", help=text)
    add(
        "--routings", nargs="+", choices=plan.KINDS, metavar="ROUTING",
        help=f"of {', '.join(plan.KINDS)} (default: the first three; for routing and variable-k all of theirs; for a "
        "setting those that have it). "
        "dense is one run along E and G (along E also one 8 times as wide), drawn as lines; it gets no --moe-... flag "
        "from behind --. "
        "docs/baselines.md describes all routings",
    )  # fmt: skip


def planned(args: argparse.Namespace) -> list[plan.Run]:
    """Return the chosen runs.

    Raises:
        RecipeError: there are none.
    """
    values = {name: given for name in (*plan.VALUES, *plan.AXES) if (given := getattr(args, name, None)) is not None}
    runs = plan.plan(args.figures, values, args.routings)
    if not runs:
        given = f"--figures {' '.join(args.figures)} --routings {' '.join(args.routings)}"
        raise RecipeError(
            f"{given}: no such routing has this setting. Choose others, or leave --routings out. moe-post needs k > 1: "
            "--granularities 2."
        )
    return runs


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    parser = argparse.ArgumentParser(
        prog="remoe sweep",
        usage="%(prog)s [options] [-- Megatron flags]",
        description=DESCRIPTION,
        epilog="docs/baselines.md has examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_runs(parser)
    how = parser.add_argument_group("how to train", "Passed to the launch scripts, whose defaults are the paper's.")
    add = how.add_argument
    for name, text in (
        ("gpus-per-node", "processes on a node (default: 8)"),
        ("train-iters", f"iterations of each run (default: {Training().iterations})"),
        ("micro-batch-size", "sequences that a process takes at once (default: the script's)"),
    ):
        add(f"--{name}", type=whole_number(1), metavar="N", help=text)
    output, text = Path(os.environ.get("OUTPUT_DIR") or ROOT / "runs" / "sweep"), "(default: OUTPUT_DIR, or runs/sweep)"
    add("--output-dir", type=Path, default=output, metavar="FOLDER", help=f"for the runs and the results {text}")
    text = f"train the quickstart's model, and two larger ones for the figure size, for {tiny.ITERATIONS} "
    text += "iterations in one process on the CPU, with its text if neither DATA_PATH nor DATA_DIR is set"
    add("--tiny", action="store_true", help=text)
    add("--corpus", choices=CORPORA, default=MIXED, help="the quickstart's text for --tiny (default: %(default)s)")
    text = "with --tiny: number of trainings at once, of one thread each (default: the number of cores)"
    add("--processes", type=whole_number(1), metavar="N", help=text)
    add("--slurm", action="store_true", help="submit each run as a job of scripts/slurm/train.sbatch")
    add("--sbatch-flags", default="", metavar='"FLAGS"', help='for sbatch; write --sbatch-flags="--nodes 2 ..."')
    add = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    add("--collect", action="store_true", help="write table and picture of what is in the output folder")
    dry_run = is_set(os.environ, "DRY_RUN")
    add("--dry-run", action="store_true", default=dry_run, help="list commands and state (also with DRY_RUN=1)")

    own, flags = split(words)
    args = parser.parse_args(own)
    training = tiny.TRAINING if args.tiny else Training()
    args.flags = tuple(flags)
    args.gpus_per_node = args.gpus_per_node or (1 if args.tiny else 8)
    args.train_iters = args.train_iters or training.iterations
    if args.tiny:
        args.micro_batch_size = args.micro_batch_size or training.micro_batch
    args.output_dir = args.output_dir.expanduser().resolve()
    args.sbatch_flags = shlex.split(args.sbatch_flags)
    if args.processes and not args.tiny:
        parser.error("--processes without --tiny: one training takes all GPUs. Add --tiny, or leave it out.")
    args.processes = args.processes or (number_of_cores() if args.tiny else 1)
    if args.sbatch_flags and not args.slurm:
        parser.error("--sbatch-flags without --slurm: nothing is submitted. Add --slurm, or leave it out.")
    for flag in args.sbatch_flags:
        if flag.startswith(("--clusters", "-M")):
            parser.error(f"--sbatch-flags {flag}: jobs of other clusters cannot be followed. Submit from that cluster.")
    return args
