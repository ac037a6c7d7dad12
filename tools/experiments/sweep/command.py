"""Train the missing runs of a sweep, or submit them to Slurm, and collect the results."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console

from ...console.display import print_table, say
from ...console.files import lock
from ...console.flags import whole
from ...console.places import LOG
from ...console.units import duration
from ...recipes.flops import vocabulary_words
from ...recipes.layout import RecipeError
from ...runs.running import run_tool
from ...runs.training_display import ShownTraining, TrainingDisplay
from . import plan, results, slurm, tiny
from .arguments import parse_arguments, planned
from .run_log import read_outcome
from .settings import Found, check_flags, flops, look, mixed_settings, set_aside_old_log, tokens_per_iteration


def sweep(console: Console, args: argparse.Namespace) -> int:
    """Train or submit what is missing, and collect; returns the exit code."""
    if args.collect:
        collect(console, args.output_dir, [])
        return 0
    runs = planned(args)
    check_flags(args.flags, runs)
    launch = plan.Launch(args.output_dir, args.gpus_per_node, args.train_iters, args.micro_batch_size, args.flags)
    if args.tiny:
        if not args.dry_run:
            tiny.make_text(os.environ, args.corpus, lambda line: say(console, line))
        small = {name: tiny.flags(size, args.train_iters, os.environ) for name, size in tiny.MODELS.items()}
        launch = replace(launch, small=small, data=tiny.environment(os.environ, args.corpus))
    if args.dry_run:
        found = look(launch, runs, by_slurm=args.slurm)
        warn_of_others(found, args.output_dir)
        list_commands(launch, found, args)
        return 0
    with lock(args.output_dir, "sweep") as held:
        found = look(launch, runs, by_slurm=args.slurm)
        warn_of_others(found, args.output_dir)
        todo = [each for each in found if not each.finished and each.job is None]
        queued = sum(each.job is not None for each in found)
        jobs = f"; {queued} queued or running as Slurm jobs" if queued else ""
        done, doing = len(found) - len(todo) - queued, "submit" if args.slurm else "train"
        say(console, f"{len(found)} runs in {args.output_dir}: {done} finished{jobs}; {len(todo)} to {doing}.")
        failed: list[str] = []
        try:
            for each in todo:
                set_aside_old_log(launch.folder(each.run), each.settings)
            if args.slurm:
                for each in todo:
                    say(console, f"  {each.run.name}: Slurm job {slurm.submit(launch, each.run, args.sbatch_flags)}")
            else:
                failed = train(console, launch, todo, args.processes, held)
        finally:
            collect(console, args.output_dir, runs)
    if failed:
        text = f"{len(failed)} of {len(found)} runs did not finish: {', '.join(failed)}."
        say(Console(stderr=True), f"{text}\nThe same command continues them.", "red")
    return 1 if failed else 0


def warn_of_others(found: Sequence[Found], output: Path) -> None:
    """Warn if runs in the output folder, or those of this call, would not compare."""
    if warning := mixed_settings(output, {each.run: each.settings for each in found}):
        say(Console(stderr=True), warning, "yellow")


def list_commands(launch: plan.Launch, found: Sequence[Found], args: argparse.Namespace) -> None:
    """Print the state and the command of each run, in a form that a shell can read, and the cost of what is missing."""
    for each in found:
        submission = slurm.sbatch_command(launch, each.run, args.sbatch_flags)
        command = submission if args.slurm else ["bash", *launch.arguments(each.run)]
        added = launch.environment(each.run, os.environ).items()
        print(f"# {each.run.name}: {each.state}")
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in added), shlex.join(command)]))
    todo = [each.settings for each in found if not each.finished and each.job is None]
    cost = f"{sum(map(flops, todo)):.3g} FLOPs"  # refuses a broken vocabulary
    words = {f" with {vocabulary_words(settings):,} words" for settings in todo}
    print(f"# to train: {len(todo)} runs, {cost}{''.join(words)}, the dense stages of ReMoE not counted")


def train(console: Console, launch: plan.Launch, todo: Sequence[Found], processes: int, held: IO[str]) -> list[str]:
    """Train runs, `processes` at once; return the names of those that did not finish."""
    failed: list[str] = []
    runs = [(each.run.name, each.settings) for each in todo]
    shown = [ShownTraining(name, whole(of, "--train-iters"), tokens_per_iteration(of), flops(of)) for name, of in runs]
    with TrainingDisplay(console, shown, held) as display:

        def run(each: Found, line: ShownTraining) -> None:
            began, folder = time.monotonic(), launch.folder(each.run)
            environment = {"PYTHON": sys.executable} | os.environ | launch.environment(each.run, os.environ)
            command = ["bash", *launch.arguments(each.run)]
            code, cause = display.run(line, command, environment | {"DRY_RUN": "0"})
            outcome = read_outcome(folder)
            if code == 0 and outcome is not None and outcome.finished:
                took = duration(time.monotonic() - began)
                display.finish(line, f"validation loss {outcome.validation_loss:.4f}, {took}")
                return
            reason = f"ended at iteration {line.done} of {line.iterations}, without its final evaluation"
            reason = f"failed with exit code {code}" if code else reason
            where = f"\nThe whole log: {folder / LOG}" if (folder / LOG).exists() else ""
            display.finish(line, f"{reason}. The end of its output:\n{cause}{where}\n")
            failed.append(each.run.name)

        display.run_all([partial(run, each, line) for each, line in zip(todo, shown, strict=True)], processes)
    return failed


def collect(console: Console, output: Path, planned: Sequence[plan.Run]) -> None:
    """Write the results and print the table.

    Raises:
        RecipeError: nothing is there.
    """
    rows = results.rows_of(output, planned)
    if not rows:
        raise RecipeError(f"--output-dir {output}: no run of a sweep is there.")
    written = results.collect(output, rows)
    console.print()
    print_table(results.HEADER, map(results.cells, rows), text=1)
    console.print()
    for warning in results.warnings(output, rows):
        say(console, f"  {warning}", "yellow")
    for path in written:
        say(console, f"  {path}")


def main(arguments: Sequence[str]) -> int:
    """Run the sweep; return the exit code."""
    args = parse_arguments(arguments)
    return run_tool("sweep", lambda: sweep(Console(), args), "stopped. The same command goes on from here")
