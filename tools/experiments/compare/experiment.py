"""Train all arms of a comparison, in parallel."""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from threading import Lock

from ...console.display import Display
from ...console.errors import ToolError
from ...console.units import duration
from .plan import ARMS, REFERENCE, TUNING_SEED, Training
from .results import Results
from .trunks import Point, Runner


class Experiment:
    """Train all arms, the reference first."""

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
                Training(experts, routing, TUNING_SEED, factor, True, args.lr_warmup_iters, args.size)
                for experts in args.experts
                for routing in dict.fromkeys(ARMS[arm].routing for arm in args.arms)
                for factor in args.lr_factors
            ]
            self._all("tuning", tunings, [args.tuning_steps])
        rates = rates_of(args, self._results)
        for (experts, routing), factor in rates.items():
            self._display.say(f"E = {experts}, {routing}: learning rate x {factor:g}")
        trainings = [
            Training(experts, arm, seed, warmup=args.lr_warmup_iters, size=args.size).tuned(rates)
            for seed in args.seeds
            for experts in args.experts
            for arm in args.arms
        ]
        self._all("comparison", sorted(trainings, key=lambda each: each.arm != REFERENCE), args.steps)
        if self._failed:
            text = "; the same command tries them again."
            raise ToolError("\n".join([f"{len(self._failed)} trainings failed{text}", *self._failed]))

    def _all(self, what: str, trainings: Sequence[Training], steps: Sequence[int]) -> None:
        """Train trunks with decays to these steps, and to those with the FLOPs of the reference, which comes first."""
        began, done, progress = time.monotonic(), 0.0, Lock()
        points = [(each, point) for each in trainings for point in self._results.of(each) if point.steps in steps]
        finished = sum(each.cost * point.steps for each, point in points if point.equal_to is None)
        total = max(sum(each.cost for each in trainings) * sum(steps) - finished, 1.0)

        def train(training: Training, reference: tuple[Training, Future[None]] | None) -> None:
            flops: dict[int, float] = {}
            if reference is not None:
                if reference[1].exception() is not None:
                    raise ToolError(f"not trained, since {reference[0].name} failed.")
                points = self._results.of(reference[0])
                flops = {point.steps: point.flops for point in points if point.equal_to is None}

            def add(point: Point) -> None:
                nonlocal done
                self._results.add(training, point)
                with progress:
                    done += training.cost * point.steps if point.equal_to is None else 0.0
                    left = (time.monotonic() - began) * max(total / done - 1, 0.0) if done else None
                cost = f"{point.flops:.3g} FLOPs, {point.seconds:.3f} s a step"
                where = f"{point.steps} steps" + (f" (FLOPs of {point.equal_to})" if point.equal_to else "")
                to_go = "" if left is None else f"; {what}: {duration(left)} left"
                self._display.say(f"{training.name}, {where}: {point.loss:.4f}, {cost}{to_go}")

            self._runner.run(training, [*steps], flops, add, self._results.of(training))

        threads = self._runner.processes.threads(self._args.processes, self._display.say)
        with self._display.step(what, len(trainings)), threads as pool:
            jobs: dict[Future[None], Training] = {}
            references: dict[tuple[int, int], tuple[Training, Future[None]]] = {}
            for each in trainings:
                job = pool.submit(train, each, references.get((each.experts, each.seed)))
                jobs[job] = each
                if each.arm == REFERENCE and not each.is_tuning:
                    references[each.experts, each.seed] = each, job
            for job in as_completed(jobs):
                self._display.advance(1)
                if isinstance(error := job.exception(), ToolError):
                    self._failed.append(f"{jobs[job].name}: {error}")
                elif error is not None:
                    raise error


def rates_of(args: argparse.Namespace, results: Results) -> dict[tuple[int, str], float]:
    """Return experts and routing → the factor on the learning rate: the tuned one, or the only one given."""
    if len(args.lr_factors) > 1:
        return results.rates(args.tuning_steps, args.lr_warmup_iters, args.size)
    return {(experts, arm.routing): args.lr_factors[0] for experts in args.experts for arm in ARMS.values()}
