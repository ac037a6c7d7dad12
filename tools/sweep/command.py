"""Train models over size, experts, granularity, routings and settings of ReMoE and its baselines, and compare them.

Runs scripts/train_llama_*.sh one after another, or submits them as Slurm jobs. What is finished is skipped, what was
cut off goes on. A table (results.csv, results.md) and a picture (results.png) end up in the output folder. Data and
layout come from the environment, as for these scripts: DATA_DIR or DATA_PATH, VOCAB_FILE, MERGE_FILE, MODEL, TP, PP,
VPP, EP, CP.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from rich.console import Console

from ..common.files import lock
from ..common.flags import above_zero, split, whole_number
from ..common.places import ROOT
from ..common.running import run_to_the_end
from ..common.units import duration
from ..cost.gpus import ACCELERATORS
from ..quickstart.corpora import CORPORA, MIXED
from ..quickstart.models import ITERATIONS, SIZE
from . import execution, plan, results, slurm, stages, tiny
from .errors import SettingsError
from .inspection import Found, look, set_aside_old_log
from .progress import SweepDisplay, Work
from .run_log import is_finished, read_outcome
from .settings import check_flags, flops, tokens_per_iteration, whole

EXAMPLES = """examples:
  all 32 runs on the 8 GPUs of this machine, one after another:
    DATA_DIR=data bash scripts/sweep.sh
  the figure over the number of experts as Slurm jobs of 2 nodes; later the same again submits what is not finished:
    DATA_DIR=data EP=8 bash scripts/sweep.sh --figures experts --slurm --sbatch-flags="--nodes 2 --time 48:00:00"
  the table and the picture of what is there, with a run of the authors' fork beside them:
    ln -s ../../fork/logs/test runs/sweep/llama_182m_remoe_e8g1_fork && bash scripts/sweep.sh --collect
  all routings beside each other; λ₀ and α with the steps until the sparsity has settled:
    DATA_DIR=data bash scripts/sweep.sh --figures routing
    DATA_DIR=data bash scripts/sweep.sh --figures l1-init l1-multiplier --train-iters 20000 --output-dir runs/lambda
  a top-k baseline tuned, with k = 1 and with k = 2 of twice as many experts:
    DATA_DIR=data bash scripts/sweep.sh --figures aux-coeff gate lr --routings moe moe-sigmoid --granularities 1 2
  hours and FLOPs of the dense stage, the way to the target and the steady stage of a ReMoE:
    bash scripts/sweep.sh --stages runs/llama_182m_remoe_e8g1
  all routings on a CPU, with the quickstart's text:
    bash scripts/sweep.sh --tiny --figures routing --output-dir runs/tiny
  a part of it, shorter, with flags for Megatron behind --:
    DATA_DIR=data bash scripts/sweep.sh --figures granularity --granularities 1 4 --train-iters 5000 -- --lr 1e-3
"""


def add_what_to_train(parser: argparse.ArgumentParser, figures: Sequence[str], default: str) -> None:
    """Add the flags that choose runs; `planned` reads them."""
    base = f"{plan.BASE_SIZE}, E = {plan.FEW_EXPERTS}, G = {plan.WHOLE}"
    what = parser.add_argument_group("what to train", f"Each figure varies one thing and keeps the others at {base}.")
    what.add_argument("--figures", nargs="+", choices=figures, help=f"default: {default}")
    what.add_argument("--sizes", nargs="+", choices=plan.SIZES, dest="size", help="of the figure size")
    for name, figure, least, more in (
        ("experts", "experts", 2, ""),
        ("granularities", "granularity", 1, "; if given, of routing and of the settings' figures (l1-init to lr) too"),
    ):
        what.add_argument(
            f"--{name}", nargs="+", type=whole_number(least), dest=figure, metavar="N",
            help=f"of the figure {figure} (default: {' '.join(map(str, plan.VALUES[figure]))}){more}",
        )  # fmt: skip
    for name, axis in plan.AXES.items():
        what.add_argument(
            f"--{name}s", nargs="+", type=above_zero, dest=name, metavar="N",
            help=f"of the figure {name}: {axis.label} (default: {' '.join(f'{number:g}' for number in axis.values)})",
        )  # fmt: skip
    what.add_argument(
        "--routings", nargs="+", choices=plan.KINDS,
        help="default: the first three, with routing all, and with the settings' figures what has the setting. "
        "dense is one run along E and G (with E one more, 8 times as wide), drawn as lines; it gets no --moe-... flag "
        "behind --. moe-warmup: top-k with 6 of 8 experts in the first 100 steps; moe-matched: top-k for as many steps "
        "as the FLOPs of the finished ReMoE beside it are worth; moe-post: softmax over the k, where G is above 1; "
        "moe-lossfree: sigmoid with loss-free balance; remoe-unbalanced: f_e = 1; docs/baselines.md tells of all",
    )  # fmt: skip


def planned(args: argparse.Namespace) -> list[plan.Run]:
    """The runs that were chosen.

    Raises:
        SettingsError: none fits.
    """
    values = {name: given for name in (*plan.VALUES, *plan.AXES) if (given := getattr(args, name, None)) is not None}
    runs = plan.plan(args.figures, values, args.routings)
    if not runs:
        told = f"--figures {' '.join(args.figures)} --routings {' '.join(args.routings)}"
        raise SettingsError(f"{told}: no such routing has this setting. Choose others, or leave --routings out.")
    return runs


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line; what stands behind -- becomes `flags`."""
    parser = argparse.ArgumentParser(
        prog="scripts/sweep.sh",
        usage="%(prog)s [options] [-- Megatron flags]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    figures = (*plan.FIGURES, plan.COMPARED, *plan.AXES)
    add_what_to_train(parser, figures, "the first three")
    how = parser.add_argument_group("how to train", "Handed to the launch scripts; their defaults are the paper's.")
    for name, help_text in (
        ("gpus-per-node", "processes on a node (default: 8)"),
        ("train-iters", "iterations of each run (default: 60000)"),
        ("micro-batch-size", "sequences that a process takes at once (default: what each size's script takes)"),
    ):
        how.add_argument(f"--{name}", type=whole_number(1), metavar="N", help=help_text)
    default_output = Path(os.environ.get("OUTPUT_DIR") or ROOT / "runs" / "sweep")
    how.add_argument(
        "--output-dir", type=Path, default=default_output, metavar="FOLDER",
        help="a folder for each run, and the results (default: OUTPUT_DIR, or runs/sweep)",
    )  # fmt: skip
    how.add_argument(
        "--tiny", action="store_true",
        help=f"on one CPU: the quickstart's model, for the figure size two larger ones too, {ITERATIONS} iterations, "
        "one process, and its text where neither DATA_PATH nor DATA_DIR is set; what stands behind -- wins",
    )  # fmt: skip
    how.add_argument(
        "--corpus", choices=CORPORA, default=MIXED, help="of the quickstart, the text of --tiny (default: %(default)s)"
    )
    how.add_argument("--slurm", action="store_true", help="submit each run as a job of scripts/slurm/train.sbatch")
    how.add_argument(
        "--sbatch-flags", default="", metavar='"FLAGS"', help='for sbatch; write --sbatch-flags="--nodes 2 ..."'
    )
    instead = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    instead.add_argument("--collect", action="store_true", help="table and picture of what is in the output folder")
    instead.add_argument(
        "--stages", nargs="+", type=Path, metavar="RUN", help="hours and FLOPs of each stage, from folders of runs"
    )
    instead.add_argument(
        "--dry-run", action="store_true", default=os.environ.get("DRY_RUN", "0") != "0",
        help="list the commands and what is finished (also with DRY_RUN=1)",
    )  # fmt: skip

    own, flags = split(words)
    args = parser.parse_args(own)
    args.flags = tuple(flags)
    args.gpus_per_node = args.gpus_per_node or (1 if args.tiny else 8)
    args.train_iters = args.train_iters or (ITERATIONS if args.tiny else 60000)
    args.figures = args.figures or plan.FIGURES
    if args.tiny:
        args.micro_batch_size = args.micro_batch_size or SIZE.batch
    args.output_dir = args.output_dir.expanduser().resolve()
    args.sbatch_flags = shlex.split(args.sbatch_flags)
    if args.sbatch_flags and not args.slurm:
        parser.error("--sbatch-flags without --slurm: nothing is submitted. Add --slurm, or leave it out.")
    for flag in args.sbatch_flags:
        if flag.startswith(("--clusters", "-M")):
            parser.error(f"--sbatch-flags {flag}: jobs of other clusters cannot be followed. Submit from that cluster.")
    return args


def sweep(console: Console, args: argparse.Namespace) -> int:
    """Train or submit what is not done, and collect; returns the exit code."""
    runs = planned(args)
    check_flags(args.flags, runs)
    launch = plan.Launch(args.output_dir, args.gpus_per_node, args.train_iters, args.micro_batch_size, args.flags)
    if args.tiny:
        small = {name: tiny.flags(size, args.train_iters, os.environ) for name, size in tiny.MODELS.items()}
        launch = replace(launch, small=small, data=tiny.environment(os.environ, args.corpus))
    waiting = waiting_runs(launch, runs)
    ready = [run for run in runs if run not in waiting]
    launch = match_flops(launch, ready)
    if args.dry_run:
        found = look(launch, ready, anywhere=args.slurm)
        list_commands(launch, found, args)
        tell_waiting(console, waiting)
        tell_cost(console, launch, found)
        return 0
    with lock(args.output_dir, "sweep") as held:
        found = look(launch, ready, anywhere=args.slurm)
        todo = [each for each in found if not each.finished and each.job is None]
        queued = sum(each.job is not None for each in found)
        told = f"; {queued} queued or running as Slurm jobs" if queued else ""
        done, doing = len(found) - len(todo) - queued, "submit" if args.slurm else "train"
        console.print(
            f"{len(found)} runs in {args.output_dir}: {done} finished{told}; {len(todo)} to {doing}.",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        failed: list[str] = []
        try:
            if args.slurm:
                submit(console, launch, todo, args.sbatch_flags)
            else:
                failed = train(console, launch, todo, held)
        finally:
            collect(console, args.output_dir, runs)
    if not failed and not args.slurm and len(waiting_runs(launch, runs)) < len(waiting):
        return sweep(console, args)
    tell_waiting(console, waiting)
    if failed:
        Console(stderr=True).print(
            f"{len(failed)} of {len(found)} runs did not finish: {', '.join(failed)}.\n"
            "The same command goes on with them.",
            style="red", highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
    return 1 if failed else 0


def waiting_runs(launch: plan.Launch, runs: Sequence[plan.Run]) -> list[plan.Run]:
    """The matched runs whose ReMoE is not finished."""
    matched = [run for run in runs if run.kind == plan.MATCHED]
    outcomes = {run: read_outcome(launch.folder(plan.partner(run))) for run in matched}
    return [run for run, outcome in outcomes.items() if not is_finished(outcome)]


def match_flops(launch: plan.Launch, ready: Sequence[plan.Run]) -> plan.Launch:
    """The launch with the iterations of the matched runs."""
    matched = [run for run in ready if run.kind == plan.MATCHED]
    iterations = {run: stages.matched_iterations(launch.folder(plan.partner(run))) for run in matched}
    return replace(launch, iterations=iterations)


def tell_waiting(console: Console, waiting: Sequence[plan.Run]) -> None:
    """Say which runs cannot start yet."""
    for run in waiting:
        line = f"# {run.name}: the same command trains it once {plan.partner(run).name} is finished"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def tell_cost(console: Console, launch: plan.Launch, found: Sequence[Found]) -> None:
    """Say what the runs that are left cost, as DRY_RUN=1 of the launch scripts does for one.

    Raises:
        SettingsError: NNODES or UTILIZATION in the environment is no such number.
    """
    todo = [each for each in found if not each.finished and each.job is None]
    total = sum(flops(each.settings) for each in todo)
    gpus, kind = launch.gpus_per_node * _given("NNODES", "1", whole_number(1)), os.environ.get("GPU") or "h100"
    utilization = _given("UTILIZATION", "0.4", above_zero)
    told = f"# to train: {len(todo)} runs, {total:.3g} FLOPs, the dense stages of ReMoE not counted"
    if kind in ACCELERATORS and not any("--cpu" in each.settings for each in todo):
        hours = ACCELERATORS[kind].hours(total, gpus, utilization)
        told += f"; {hours:,.3g} h on {gpus} x {kind} at {utilization:.0%} of their rate"
    console.print(told, highlight=False, soft_wrap=True, markup=False)


def _given[Number: (int, float)](name: str, default: str, convert: Callable[[str], Number]) -> Number:
    """A number in the environment."""
    try:
        return convert(os.environ.get(name) or default)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(f"{name} {error}.") from error


def list_commands(launch: plan.Launch, found: Sequence[Found], args: argparse.Namespace) -> None:
    """Print the state and the command of each run, in a form that a shell can read."""
    for each in found:
        submission = slurm.sbatch_command(launch, each.run, args.sbatch_flags)
        command = submission if args.slurm else ["bash", *launch.arguments(each.run)]
        added = launch.environment(each.run, os.environ).items()
        print(f"# {each.run.name}: {each.state}")
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in added), shlex.join(command)]))


def train(console: Console, launch: plan.Launch, todo: Sequence[Found], held: IO[str]) -> list[str]:
    """Train runs one after another; returns the names of those that did not finish."""
    failed = []
    works = [
        Work(
            name=each.run.name,
            place=f"{number}/{len(todo)}",
            iterations=whole(each.settings, "--train-iters"),
            tokens_per_iteration=tokens_per_iteration(each.settings),
            cost=flops(each.settings),
        )
        for number, each in enumerate(todo, start=1)
    ]
    with SweepDisplay(console, works) as display:
        for each, work in zip(todo, works, strict=True):
            folder, began = launch.folder(each.run), time.monotonic()
            set_aside_old_log(folder, each.settings)
            problem = execution.train(launch, each.run, display, work, held)
            outcome = read_outcome(folder)
            if problem is None and outcome is not None:
                display.finish(
                    work, f"validation loss {outcome.validation_loss:.4f}, {duration(time.monotonic() - began)}"
                )
            else:
                display.finish(work, f"{problem}\n")
                failed.append(each.run.name)
    return failed


def submit(console: Console, launch: plan.Launch, todo: Sequence[Found], flags: Sequence[str]) -> None:
    """Submit runs as Slurm jobs."""
    for each in todo:
        set_aside_old_log(launch.folder(each.run), each.settings)
        number = slurm.submit(launch, each.run, flags, each.settings)
        console.print(f"  {each.run.name}: Slurm job {number}", highlight=False, markup=False)


def collect(console: Console, output: Path, planned: Sequence[plan.Run]) -> None:
    """Write the results and print the table.

    Raises:
        SettingsError: nothing is there.
    """
    rows = results.rows_of(output, planned)
    if not rows:
        raise SettingsError(f"--output-dir {output}: no run of a sweep is there.")
    written = results.collect(output, rows)
    console.print()
    results.show(console, rows)
    console.print()
    if warning := results.unequal(rows):
        console.print(f"  {warning}", style="yellow", highlight=False, markup=False)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True, markup=False)


def main() -> int:
    """Run the sweep; returns the exit code."""
    args = parse_arguments(sys.argv[1:])
    return run_to_the_end(lambda: _run(Console(), args))


def _run(console: Console, args: argparse.Namespace) -> int:
    try:
        if args.stages:
            stages.show(console, args.stages)
            return 0
        if args.collect:
            collect(console, args.output_dir, [])
            return 0
        return sweep(console, args)
    except BrokenPipeError:  # of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
