"""The trainings of a comparison: sweeps of a few runs as processes, and what they came to so far."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.display import Display
from ..common.errors import ToolError
from ..common.flags import parse
from ..common.places import ROOT
from ..common.units import duration
from ..quickstart import corpora, corpus, dataset
from ..quickstart.models import SIZE
from ..sweep import results, tiny
from ..sweep.plan import MATCHED, Run
from ..sweep.run_log import Outcome, log_of
from . import inside
from .recipes import TUNED, Recipe, recipe_of, reference_of, title, tune
from .table import Result

SPLIT = "95,2.5,2.5"
EVALUATED = 64  # batches of each part
TUNING_SEED = 1233


class Processes:
    """Starts sweeps of a few runs, and analyses, as processes of one thread, and ends them when told to stop."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def train(
        self, folder: Path, text: Path, iterations: int, seed: int, options: Iterable[str], flags: Iterable[str]
    ) -> dict[Run, Outcome]:
        """What the runs of one call came to.

        Args:
            folder: for the runs.
            text: the quickstart's data.
            iterations: of each.
            seed: of each.
            options: for scripts/sweep.sh.
            flags: for Megatron behind them.

        Raises:
            ToolError: one did not finish.
        """
        behind = ["--split", SPLIT, "--eval-iters", str(EVALUATED), "--seed", str(seed), *flags]
        command = ["bash", str(ROOT / "scripts" / "sweep.sh"), "--tiny", "--train-iters", str(iterations)]
        command += ["--output-dir", str(folder), *options, "--", *behind]
        self._run(command, tiny.text_in(text, text.parent.name), f"The logs: {log_of(folder / '*')}")
        rows = results.rows_of(folder, [])
        return {row.run: row.outcome for row in rows if row.outcome is not None and row.outcome.finished}

    def analyze(self, run: Path, text: Path) -> inside.Figures:
        """What tools/analyze finds in a run with the held-out sets of a text, each a domain.

        Raises:
            ToolError: it found nothing.
        """
        if inside.is_there(run):
            return inside.read(run / "analysis")
        sets = [str(index.with_suffix("")) for index in sorted(text.glob("heldout_*.idx"))]
        command = [sys.executable, str(ROOT / "tools" / "analyze"), "--load", str(run / "checkpoints")]
        command += ["--output-dir", str(run / "analysis"), "--sequences", str(inside.SEQUENCES), "--data-path", *sets]
        self._run(command, {}, f"The command: {shlex.join(command)}")
        return inside.read(run / "analysis")

    def _run(self, command: Sequence[str], settings: Mapping[str, str], where: str) -> None:
        """
        Args:
            settings: of the environment.
            where: to look if it fails.
        """
        if self._stopped:
            raise KeyboardInterrupt
        # Ctrl-C reaches it through `stop` alone: a second one would end it without a checkpoint.
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | dict(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._running.add(process)
        if self._stopped:
            process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
        self._running.discard(process)
        if process.returncode and not self._stopped:
            raise ToolError(f"{errors.strip()}\n{where}")

    def stop(self) -> None:
        """End all, after a last checkpoint each."""
        self._stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


class Failed:
    """Jobs that came to nothing."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.reasons: list[str] = []

    def tells(self, job: Future[Any], told: str, place: str = "") -> bool:
        """Whether a job is one of them, which is said."""
        error = job.exception()
        if not isinstance(error, ToolError):
            return False
        self.reasons.append(f"{told}: {error}")
        self._display.say(f"{told}: failed {place}".rstrip())
        return True


def make_text(folder: Path, name: str, display: Display) -> Path:
    """A corpus as the quickstart's data; reused where it is there."""
    text = corpus.build(folder / "corpus", display.say, name, corpora.CORPORA[name]())
    dataset.build(folder / "data", folder / "corpus", text, threads=1)
    return folder / "data"


class Comparison:
    """Trainings of all corpora, in a pool of processes, and what they came to so far."""

    def __init__(self, args: argparse.Namespace, output: Path, display: Display) -> None:
        self._args, self._output, self._display = args, output, display
        self._processes = Processes()
        self._at_work: dict[Path, threading.Lock] = {}
        self._texts = {name: make_text(output / name, name, display) for name in args.corpora}
        self.recipes: dict[str, dict[str, Recipe]] = {name: {} for name in args.corpora}
        self.results: dict[str, dict[str, dict[int, Result]]] = {name: {} for name in args.corpora}

    def run(self) -> None:
        """Tune, then train, each with all processes; what is under way is saved when this is interrupted.

        Raises:
            ToolError: trainings failed; the others have come to their end.
        """
        args, failed = self._args, Failed(self._display)
        with ThreadPoolExecutor(args.processes) as threads:
            try:
                choices = {
                    threads.submit(self._tuned, name, row): (name, row)
                    for row in args.rows
                    if row in TUNED
                    for name in args.corpora
                }
                for choice, _ in self._followed("tuning", choices):
                    name, row = choices[choice]
                    told = f"{name}: {title(row)}"
                    if not failed.tells(choice, told):
                        self.recipes[name][row] = choice.result()
                        self._display.say(f"{told} is {self.recipes[name][row]}")
                jobs = {
                    threads.submit(self._trained, name, row, seed): (name, row, seed)
                    for row in args.rows
                    for seed in args.seeds
                    for name in args.corpora
                    if row not in TUNED or row in self.recipes[name]
                }
                for job, place in self._followed("training", jobs):
                    name, row, seed = jobs[job]
                    told = f"{name}: {title(row)}, seed {seed}"
                    if not failed.tells(job, told, place):
                        result = self.results[name].setdefault(row, {})[seed] = job.result()
                        self._display.say(f"{told}: {result.loss:.4f} {place}")
                looks = {
                    threads.submit(self._analyzed, name, row, seed): (name, row, seed)
                    for name, rows in self.results.items()
                    for row, of in rows.items()
                    if args.analyze and inside.is_analyzed(self._recipe(name, row).run)
                    for seed in of
                }
                for look, place in self._followed("analyzing", looks):
                    name, row, seed = looks[look]
                    told = f"{name}: {title(row)}, seed {seed}: tools/analyze"
                    if not failed.tells(look, told, place):
                        of = self.results[name][row]
                        of[seed] = replace(of[seed], routing=look.result())
                        self._display.say(f"{told} {place}")
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._processes.stop()
                raise
        if failed.reasons:
            raise ToolError(
                "\n".join([f"{len(failed.reasons)} failed; the same command tries them again.", *failed.reasons])
            )

    def _tuned(self, name: str, row: str) -> Recipe:
        def train(options: Sequence[str], flags: Sequence[str]) -> dict[Run, Outcome]:
            folder = self._output / name / row / ("together" if flags else "tuning")
            behind = [*flags, *self._args.flags]
            return self._processes.train(
                folder, self._texts[name], self._args.tuning_iters, TUNING_SEED, options, behind
            )

        return tune(TUNED[row], train, parse(tiny.flags(SIZE, self._args.tuning_iters, os.environ)))

    def _trained(self, name: str, row: str, seed: int) -> Result:
        recipe, folder = self._recipe(name, row), self._folder(name, row, seed)
        flags = [*recipe.flags, *self._args.flags]
        with self._at_work.setdefault(folder, threading.Lock()):
            found = self._processes.train(
                folder, self._texts[name], self._args.train_iters, seed, recipe.options(), flags
            )
        outcome = found[recipe.run]
        if outcome.test_loss is None:
            raise ToolError(f"{log_of(folder / recipe.run.name)}: has no loss on the test set.")
        return Result(outcome.test_loss, outcome.settled, outcome.flip_rate, outcome.flip_count)

    def _analyzed(self, name: str, row: str, seed: int) -> inside.Figures:
        run = self._recipe(name, row).run
        return self._processes.analyze(self._folder(name, row, seed) / run.name, self._texts[name])

    def _recipe(self, name: str, row: str) -> Recipe:
        return self.recipes[name][row] if row in TUNED else recipe_of(row)

    def _folder(self, name: str, row: str, seed: int) -> Path:
        """Matched runs are trained beside their ReMoE, by whose FLOPs they go."""
        beside = reference_of(row) if self._recipe(name, row).run.kind == MATCHED else row
        return self._output / name / beside / f"seed-{seed}"

    def _followed[Job: Future[Any]](self, what: str, jobs: Iterable[Job]) -> Iterator[tuple[Job, str]]:
        """The jobs as they finish, each with its number and the time left, and a bar."""
        waiting, began = list(jobs), time.monotonic()
        with self._display.step(what, len(waiting)):
            for number, job in enumerate(as_completed(waiting), start=1):
                self._display.advance(1)
                left = duration((time.monotonic() - began) / number * (len(waiting) - number))
                yield job, f"({number}/{len(waiting)}, {left} left)"
