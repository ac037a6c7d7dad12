"""Measure ReMoE's lead over other ways of training, by length, at equal steps and at equal FLOPs.

python tools/gap --experts 8 --arms remoe moe --steps 400 1200 --seeds 1 2 3   # about an hour on 2 cores
python tools/gap                                                              # everything: days
python tools/gap --collect                                                    # print the tables so far

Each arm and seed trains one trunk with a constant learning rate. At each length a decay over the last fifth branches
off and is evaluated on all held-out text. Every other arm has one more decay for each length, where it has used exactly
the FLOPs of ReMoE at that length. First the learning rate of ReMoE and of top-k is tuned for each number of experts, on
another part of the text and with another seed, in as many trainings each. The same command continues after a stop.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from ..common.display import Display
from ..common.errors import ToolError
from ..common.files import lock, write_json
from ..common.flags import above_zero, whole_number
from ..common.places import ROOT
from ..common.running import run_once
from ..common.units import duration
from ..compare.trainings import TUNING_SEED, make_text
from ..quickstart import corpora
from .plan import ARMS, LEAST, LOG_INTERVAL, REFERENCE, Training, tuned
from .table import markdown
from .trunks import Point, Runner

STEPS = (400, 1200, 3600, 12000)
EXPERTS = (8, 32, 128)
FACTORS = (0.25, 0.5, 1.0, 2.0)
SEEDS = tuple(range(1, 9))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/gap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = whole_number(1)
    parser.add_argument("--corpus", choices=corpora.CORPORA, default="mixed", help="default: %(default)s")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument(
        "--experts", nargs="+", type=number, default=[*EXPERTS], metavar="E", help="default: %(default)s"
    )
    parser.add_argument("--steps", nargs="+", type=number, default=[*STEPS], metavar="N", help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=number, default=[*SEEDS], metavar="N", help="default: 1 to 8")
    parser.add_argument(
        "--lr-factors", nargs="+", type=above_zero, default=[*FACTORS], metavar="X",
        help="factors on the learning rate to tune over; one: no tuning (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tuning-steps", type=number, default=1200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--margin", type=above_zero, default=0.01, metavar="NATS",
        help="largest difference of two losses that counts as none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=number, default=len(os.sched_getaffinity(0)), metavar="N",
        help="number of parallel trainings, with one thread each (default: the number of cores)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "runs" / "gap", metavar="FOLDER", help="default: runs/gap"
    )
    parser.add_argument("--collect", action="store_true", help="only print the tables")
    args = parser.parse_args(arguments)
    args.arms = [arm for arm in ARMS if arm in args.arms or arm == REFERENCE]
    for flag in ("steps", "tuning_steps"):
        values = args.steps if flag == "steps" else [args.tuning_steps]
        if wrong := [value for value in values if value % LOG_INTERVAL or value < LEAST]:
            parser.error(
                f"--{flag.replace('_', '-')} {wrong[0]}: give a multiple of {LOG_INTERVAL} of at least {LEAST}."
            )
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: reserved for tuning. Give another one.")
    return args


class Results:
    """The points of all trainings, in one file."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def of(self, training: Training) -> list[Point]:
        """Return the points of a training."""
        return [Point(**point) for point in self._found.get(training.name, {}).get("points", [])]

    def add(self, training: Training, point: Point) -> None:
        """Add a point, and write the file."""
        with self._lock:
            entry = self._found.setdefault(training.name, asdict(training) | {"points": []})
            entry["points"].append(asdict(point))
            write_json(self._path, self._found)

    def rates(self, args: argparse.Namespace) -> dict[tuple[int, str], float]:
        """Return experts and routing → the factor on the learning rate with the lowest loss, or the only one given."""
        if len(args.lr_factors) == 1:
            return {(experts, arm.routing): args.lr_factors[0] for experts in args.experts for arm in ARMS.values()}
        best: dict[tuple[int, str], tuple[float, float]] = {}
        for entry in self._found.values():
            losses = [point["loss"] for point in entry["points"] if point["steps"] == args.tuning_steps]
            if entry["is_tuning"] and losses:
                key = entry["experts"], ARMS[entry["arm"]].routing
                best[key] = min(best.get(key, (float("inf"), 1.0)), (losses[0], entry["factor"]))
        return {key: factor for key, (_, factor) in best.items()}


class Experiment:
    """Train all arms; the reference before those that are matched to it."""

    def __init__(self, args: argparse.Namespace, results: Results, runner: Runner, display: Display) -> None:
        self._args, self._results, self._runner, self._display = args, results, runner, display
        self._failed: list[str] = []

    def run(self) -> None:
        """Tune and train.

        Raises:
            ToolError: some failed; the others have finished.
        """
        args = self._args
        if len(args.lr_factors) > 1:
            tunings = [
                Training(experts, arm, TUNING_SEED, factor, is_tuning=True)
                for experts in args.experts
                for arm in (REFERENCE, "moe")
                if arm in args.arms
                for factor in args.lr_factors
            ]
            self._all("tuning", tunings, [args.tuning_steps])
        rates = self._results.rates(args)
        for (experts, routing), factor in rates.items():
            self._display.say(f"E = {experts}, {routing}: learning rate x {factor:g}")
        trainings = [
            tuned(Training(experts, arm, seed), rates)
            for seed in args.seeds
            for experts in args.experts
            for arm in args.arms
        ]
        first = [training for training in trainings if training.arm == REFERENCE]
        self._all("reference", first, args.steps)
        of = {(each.experts, each.seed): self._results.of(each) for each in first}
        others = [training for training in trainings if training.arm != REFERENCE]
        self._all("others", others, args.steps, lambda each: of[each.experts, each.seed])
        if self._failed:
            text = "; the same command tries them again."
            raise ToolError("\n".join([f"{len(self._failed)} trainings failed{text}", *self._failed]))

    def _all(
        self,
        what: str,
        trainings: Sequence[Training],
        steps: Sequence[int],
        reference: Callable[[Training], Iterable[Point]] = lambda _: (),
    ) -> None:
        """Train trunks with decays to these steps, and to those with the reference's FLOPs."""
        began, done = time.monotonic(), 0.0
        total = sum(map(_cost, trainings)) * sum(steps)
        points = [(each, point) for each in trainings for point in self._results.of(each)]
        finished = sum(_cost(each) * point.steps for each, point in points if point.equal_to is None)
        total, progress = max(total - finished, 1.0), Lock()

        def train(training: Training) -> None:
            flops = {point.steps: point.flops for point in reference(training) if point.equal_to is None}

            def add(point: Point) -> None:
                nonlocal done
                self._results.add(training, point)
                with progress:
                    done += _cost(training) * point.steps if point.equal_to is None else 0.0
                    left = (time.monotonic() - began) / max(done, 1.0) * max(total - done, 0.0)
                cost = f"{point.flops:.3g} FLOPs, {point.seconds:.3f} s a step"
                where = f"{point.steps} steps" + (f" (FLOPs of {point.equal_to})" if point.equal_to else "")
                self._display.say(f"{training.name}, {where}: {point.loss:.4f}, {cost}; {what}: {duration(left)} left")

            self._runner.run(training, [*steps], flops, add, self._results.of(training))

        with ThreadPoolExecutor(self._args.processes) as threads, self._display.step(what, len(trainings)):
            try:
                jobs = {threads.submit(train, training): training for training in trainings}
                for job in as_completed(jobs):
                    self._display.advance(1)
                    if isinstance(error := job.exception(), ToolError):
                        self._failed.append(f"{jobs[job].name}: {error}")
                    elif error is not None:
                        raise error
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._runner.stop()
                raise


def _cost(training: Training) -> float:
    """Return the time of a step in relation to other trainings, for the time left."""
    return 1.0 + training.experts / 32


def tables(args: argparse.Namespace, results: Results) -> Iterable[str]:
    """Yield the lines of all tables."""
    rates = results.rates(args)
    for experts in args.experts:
        points = {
            arm: {
                seed: found for seed in args.seeds if (found := results.of(tuned(Training(experts, arm, seed), rates)))
            }
            for arm in args.arms
        }
        if any(points.values()):
            yield from ["", f"E = {experts}, {args.corpus}:", "", *markdown(points, args.margin)]


def measure(args: argparse.Namespace, display: Display) -> None:
    """Train what is missing, and print the tables.

    Raises:
        ToolError: something failed; the message names the remedy.
    """
    output = args.output_dir.expanduser().resolve() / args.corpus
    with lock(output, "experiment") as held:
        results = Results(output / "results.json")
        try:
            if not args.collect:
                text = make_text(output, args.corpus, display)
                manifest = json.loads((text / "manifest.json").read_text(encoding="utf-8"))
                runner = Runner(output / "trainings", text, manifest, held)
                Experiment(args, results, runner, display).run()
        finally:
            display.say("\n".join(tables(args, results)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and return the exit code: 0, 1 after an error, 130 after a stop."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)

    def work() -> None:
        with Display() as display:
            measure(args, display)

    return run_once("gap", work, "stopped; the same command goes on from here")
