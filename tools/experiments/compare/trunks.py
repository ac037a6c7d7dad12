"""Train trunks and their decays as processes; each continues where a stop left it."""

import heapq
import math
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.remoe.start.checkpoint_files import newest_iteration

from ...console.errors import ToolError
from ...console.flags import words_of
from ...console.places import entry
from ...recipes.flops import flops_per_sequence
from ...recipes.stages import Flops, stages
from ...runs.figure_reader import LOG, METRICS, read_figures
from ...runs.training_process import Processes
from .plan import TRUNK, Training, flags_of, rounded, trunk_steps

SAVE_INTERVAL = 200


@dataclass(frozen=True)
class Point:
    """The result of a decay.

    Attributes:
        steps: of trunk and decay together.
        equal_to: steps of the reference whose FLOPs it has; None if its steps are the reference's.
        loss: nats per token over all evaluated text.
        flops: of trunk and decay, with the experts that were computed.
        seconds: of a step, median over the decay; NaN if it was not kept.
        first_near: the first logged step with S within 1 % of its target; None without ReLU routing, or if there is
            none.
        inactive: number of experts in each layer that are inactive at the end.
    """

    steps: int
    equal_to: int | None
    loss: float
    flops: float
    seconds: float = math.nan
    first_near: int | None = None
    inactive: Sequence[int] = ()


class Runner:
    """Train on one corpus; `processes` hold the trainings."""

    def __init__(self, output: Path, text: Path, manifest: Mapping[str, Any], lock: IO[str]) -> None:
        self._output, self._text, self._tokens = output, text, manifest["tokens"]
        self.processes = Processes(lock)

    def run(
        self,
        training: Training,
        wanted: list[int],
        reference: Mapping[int, float],
        done: Callable[[Point], None],
        found: list[Point],
    ) -> None:
        """Train a trunk and the decays to all its points.

        Args:
            training: the trunk.
            wanted: steps of its points; multiples of the log's interval.
            reference: steps → FLOPs of the reference, to which one more point each is matched.
            done: called with each new point.
            found: points that exist.

        Raises:
            ToolError: a training failed.
        """
        points = {(point.equal_to, point.equal_to or point.steps): point for point in found}
        queue = [(steps, 0) for steps in wanted]
        heapq.heapify(queue)
        while queue:
            steps, reference_steps = heapq.heappop(queue)
            equal_to = reference_steps or None
            point = points.get((equal_to, equal_to or steps))
            if point is None:
                point = self._train(training, steps, equal_to)
                done(point)
            if equal_to is None and steps in reference and (steps, steps) not in points:
                matched = self._matched(training, point, reference[steps])
                # A trunk does not go back: an arm that costs more than the reference has no such point.
                if matched >= steps:
                    heapq.heappush(queue, (matched, steps))

    def _matched(self, training: Training, point: Point, flops: float) -> int:
        """Return the steps at which the training has used these FLOPs, with k experts per token from here on.

        Baseline routers go on with as many as in the decay.
        """
        figures = read_figures(self._folder(training) / f"decay-{point.steps}")
        experts = figures.experts_per_token(np.array([trunk_steps(point.steps), point.steps]))[-1]
        is_counted = figures.target_sparsity is None and math.isfinite(experts)
        args = Namespace(**figures.args)
        step = figures.batches(np.array([point.steps]))[0] * flops_per_sequence(args, experts if is_counted else None)
        return rounded(point.steps + (flops - point.flops) / step)

    def _train(self, training: Training, steps: int, equal_to: int | None) -> Point:
        folder, begin = self._folder(training), trunk_steps(steps)
        trunk, decay = folder / "trunk", folder / f"decay-{steps}"
        if not (decay / METRICS).exists():
            if _newest(trunk) > begin:
                raise ToolError(
                    f"{trunk} is at step {_newest(trunk)} already, and the decay to --steps {steps} starts at {begin}. "
                    "Leave it out, or give --output-dir another folder."
                )
            if _newest(trunk) < begin:
                self._start(training, trunk, trunk, TRUNK, "--exit-interval", str(begin))
            if _newest(trunk) != begin:
                raise ToolError(f"{trunk / LOG}: the training ended at step {_newest(trunk)} instead of {begin}.")
            decay.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trunk / METRICS, decay / METRICS)  # the decay continues its running sums
        if not read_figures(decay).final_losses(steps):
            load = decay if _newest(decay) else trunk
            self._start(training, load, decay, steps, "--override-opt_param-scheduler")
        point = self._read(training, decay, steps, equal_to)
        for checkpoint in decay.glob("iter_*"):
            shutil.rmtree(checkpoint)
        return point

    def _start(self, training: Training, load: Path, save: Path, steps: int, *more: str) -> None:
        settings = flags_of(training, self._text, self._tokens["train"], steps)
        flags = [*words_of(settings), "--save", str(save), "--load", str(load), *more]
        # The newest checkpoint alone is kept.
        flags += ["--save-interval", str(SAVE_INTERVAL), "--save-retain-interval", str(TRUNK)]
        save.mkdir(parents=True, exist_ok=True)
        with (save / LOG).open("a", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            with self.processes.start([sys.executable, *entry(), *flags], environment, log) as process:
                pass
        if process.returncode:
            raise ToolError(f"{save / LOG}: the training ended with exit code {process.returncode}.")

    def _folder(self, training: Training) -> Path:
        return self._output / training.name

    def _read(self, training: Training, decay: Path, steps: int, equal_to: int | None) -> Point:
        figures = read_figures(decay)
        sets = [""] if training.is_tuning else self._tokens["heldout"]
        loss = figures.validation_loss
        if loss is None or not figures.final_losses(steps).keys() >= {*sets}:
            raise ToolError(f"{decay / LOG}: there is no validation loss after step {steps}.")
        flops = stages(figures, Flops.of(figures.args))
        iterations, seconds = figures.curve("seconds_per_iteration")
        return Point(
            steps=steps,
            equal_to=equal_to,
            loss=loss,
            flops=sum(stage.flops for stage in flops),
            seconds=float(np.median(seconds[iterations > trunk_steps(steps)])),
            first_near=figures.first_near,
            inactive=figures.inactive_experts,
        )


def _newest(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    newest = newest_iteration(folder)
    return int(newest) if newest.isdecimal() else 0
