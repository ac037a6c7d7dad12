"""Trains what is missing of a sweep, or submits it to Slurm, and collects the results."""

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
from ..common.flags import above_zero, whole_number
from ..common.running import run_to_the_end
from ..common.units import duration
from ..cost.gpus import ACCELERATORS
from ..recipes.layout import RecipeError
from . import execution, plan, results, slurm, stages, tiny
from .arguments import add_what_to_train as add_what_to_train
from .arguments import parse_arguments, planned
from .inspection import Found, look, set_aside_old_log
from .progress import SweepDisplay, Work
from .run_log import is_finished, read_outcome
from .settings import check_flags, flops, tokens_per_iteration, whole


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is."""
    console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


def sweep(console: Console, args: argparse.Namespace) -> int:
    """Train or submit what is missing, and collect; returns the exit code."""
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
        found = look(launch, ready, by_slurm=args.slurm)
        list_commands(launch, found, args)
        tell_waiting(console, waiting)
        tell_cost(console, launch, found)
        return 0
    with lock(args.output_dir, "sweep") as held:
        found = look(launch, ready, by_slurm=args.slurm)
        todo = [each for each in found if not each.finished and each.job is None]
        queued = sum(each.job is not None for each in found)
        jobs = f"; {queued} queued or running as Slurm jobs" if queued else ""
        done, doing = len(found) - len(todo) - queued, "submit" if args.slurm else "train"
        say(console, f"{len(found)} runs in {args.output_dir}: {done} finished{jobs}; {len(todo)} to {doing}.")
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
        text = f"{len(failed)} of {len(found)} runs did not finish: {', '.join(failed)}."
        say(Console(stderr=True), f"{text}\nThe same command continues them.", "red")
    return 1 if failed else 0


def waiting_runs(launch: plan.Launch, runs: Sequence[plan.Run]) -> list[plan.Run]:
    """Return the matched runs whose ReMoE is not finished."""
    matched = [run for run in runs if run.kind == plan.MATCHED]
    outcomes = {run: read_outcome(launch.folder(plan.partner(run))) for run in matched}
    return [run for run, outcome in outcomes.items() if not is_finished(outcome)]


def match_flops(launch: plan.Launch, ready: Sequence[plan.Run]) -> plan.Launch:
    """Return the launch with the iterations of the matched runs."""
    matched = [run for run in ready if run.kind == plan.MATCHED]
    iterations = {run: stages.matched_iterations(launch.folder(plan.partner(run))) for run in matched}
    return replace(launch, iterations=iterations)


def tell_waiting(console: Console, waiting: Sequence[plan.Run]) -> None:
    """Print which runs cannot start yet."""
    for run in waiting:
        say(console, f"# {run.name}: the same command trains it once {plan.partner(run).name} is finished")


def tell_cost(console: Console, launch: plan.Launch, found: Sequence[Found]) -> None:
    """Print what the missing runs cost.

    Raises:
        RecipeError: NNODES or UTILIZATION in the environment is no such number.
    """
    todo = [each for each in found if not each.finished and each.job is None]
    total = sum(flops(each.settings) for each in todo)
    gpus, kind = launch.gpus_per_node * _given("NNODES", "1", whole_number(1)), os.environ.get("GPU") or "h100"
    utilization = _given("UTILIZATION", "0.4", above_zero)
    text = f"# to train: {len(todo)} runs, {total:.3g} FLOPs, the dense stages of ReMoE not counted"
    if kind in ACCELERATORS and not any("--cpu" in each.settings for each in todo):
        hours = ACCELERATORS[kind].hours(total, gpus, utilization)
        text += f"; {hours:,.3g} h on {gpus} x {kind} at {utilization:.0%} of their rate"
    say(console, text)


def _given[Number: (int, float)](name: str, default: str, convert: Callable[[str], Number]) -> Number:
    """Return a number from the environment."""
    try:
        return convert(os.environ.get(name) or default)
    except argparse.ArgumentTypeError as error:
        raise RecipeError(f"{name} {error}.") from error


def list_commands(launch: plan.Launch, found: Sequence[Found], args: argparse.Namespace) -> None:
    """Print the state and the command of each run, in a form that a shell can read."""
    for each in found:
        submission = slurm.sbatch_command(launch, each.run, args.sbatch_flags)
        command = submission if args.slurm else ["bash", *launch.arguments(each.run)]
        added = launch.environment(each.run, os.environ).items()
        print(f"# {each.run.name}: {each.state}")
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in added), shlex.join(command)]))


def train(console: Console, launch: plan.Launch, todo: Sequence[Found], held: IO[str]) -> list[str]:
    """Train runs one after another; return the names of those that did not finish."""
    failed = []
    works = [
        Work(
            each.run.name,
            f"{number}/{len(todo)}",
            whole(each.settings, "--train-iters"),
            tokens_per_iteration(each.settings),
            cost=flops(each.settings),
        )  # fmt: skip
        for number, each in enumerate(todo, start=1)
    ]
    with SweepDisplay(console, works) as display:
        for each, work in zip(todo, works, strict=True):
            folder, began = launch.folder(each.run), time.monotonic()
            set_aside_old_log(folder, each.settings)
            problem = execution.train(launch, each.run, display, work, held)
            outcome = read_outcome(folder)
            if problem is None and outcome is not None:
                took = duration(time.monotonic() - began)
                display.finish(work, f"validation loss {outcome.validation_loss:.4f}, {took}")
            else:
                display.finish(work, f"{problem}\n")
                failed.append(each.run.name)
    return failed


def submit(console: Console, launch: plan.Launch, todo: Sequence[Found], flags: Sequence[str]) -> None:
    """Submit runs as Slurm jobs."""
    for each in todo:
        set_aside_old_log(launch.folder(each.run), each.settings)
        number = slurm.submit(launch, each.run, flags)
        say(console, f"  {each.run.name}: Slurm job {number}")


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
    results.show(console, rows)
    console.print()
    if warning := results.unequal(rows):
        console.print(f"  {warning}", style="yellow", highlight=False, markup=False)
    for path in written:
        say(console, f"  {path}")


def main(arguments: Sequence[str]) -> int:
    """Run the sweep; return the exit code."""
    args = parse_arguments(arguments)
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
