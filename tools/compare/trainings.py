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
from ..sweep.run_log import Outcome, is_finished, log_of
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
        return {row.run: row.outcome for row in rows if is_finished(row.outcome)}

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


def make_text(folder: Path, name: str, display: Display) -> Path:
    """A corpus as the quickstart's data; reused where it is there."""
    text = corpus.build(folder / "corpus", display.say, name, corpora.CORPORA[name]())
    dataset.build(folder / "data", folder / "corpus", text, threads=1)
    return folder / "data"


class Comparison:
    """Trainings of all corpora, in a pool of processes, and what they came to so far."""

    def __init__(self, args: argparse.Namespace, output: Path, display: Display) -> None:
        self._args, self._output, self._display = args, output, display
        self._processes, self._failed = Processes(), list[str]()
        self._at_work: dict[Path, threading.Lock] = {}
        self._texts = {name: make_text(output / name, name, display) for name in args.corpora}
        self.recipes: dict[str, dict[str, Recipe]] = {name: {} for name in args.corpora}
        self.results: dict[str, dict[str, dict[int, Result]]] = {name: {} for name in args.corpora}

    def run(self) -> None:
        """Tune, then train, each with all processes; what is under way is saved when this is interrupted.

        Raises:
            ToolError: trainings failed; the others have come to their end.
        """
        args, say = self._args, self._display.say
        with ThreadPoolExecutor(args.processes) as threads:
            try:
                choices = {
                    threads.submit(self._tuned, name, row): (name, row, f"{name}: {title(row)}")
                    for row in args.rows
                    if row in TUNED
                    for name in args.corpora
                }
                for (name, row, told), recipe, _ in self._found("tuning", choices):
                    self.recipes[name][row] = recipe
                    say(f"{told} is {recipe}")
                jobs = {
                    threads.submit(self._trained, name, row, seed): (name, row, seed, _told(name, row, seed))
                    for row in args.rows
                    for seed in args.seeds
                    for name in args.corpora
                    if row not in TUNED or row in self.recipes[name]
                }
                for (name, row, seed, told), result, place in self._found("training", jobs):
                    self.results[name].setdefault(row, {})[seed] = result
                    say(f"{told}: {result.loss:.4f} {place}")
                looks = {
                    threads.submit(self._analyzed, name, row, seed): (
                        of,
                        seed,
                        f"{_told(name, row, seed)}: tools/analyze",
                    )
                    for name, rows in self.results.items()
                    for row, of in rows.items()
                    if args.analyze and inside.is_analyzed(self._recipe(name, row).run)
                    for seed in of
                }
                for (of, seed, told), routing, place in self._found("analyzing", looks):
                    of[seed] = replace(of[seed], routing=routing)
                    say(f"{told} {place}")
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._processes.stop()
                raise
        if self._failed:
            told = f"{len(self._failed)} failed; the same command tries them again."
            raise ToolError("\n".join([told, *self._failed]))

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

    def _found[Key: tuple[Any, ...], Value](
        self, what: str, jobs: Mapping[Future[Value], Key]
    ) -> Iterator[tuple[Key, Value, str]]:
        """What jobs came to as they finish, with their number and the time left; those that failed are told.

        Args:
            what: is done, for the bar.
            jobs: each with its key, whose last part is what to call it.
        """
        began = time.monotonic()
        with self._display.step(what, len(jobs)):
            for number, job in enumerate(as_completed(jobs), start=1):
                self._display.advance(1)
                left = duration((time.monotonic() - began) / number * (len(jobs) - number))
                key, place = jobs[job], f"({number}/{len(jobs)}, {left} left)"
                if isinstance(error := job.exception(), ToolError):
                    self._failed.append(f"{key[-1]}: {error}")
                    self._display.say(f"{key[-1]}: failed {place}")
                else:
                    yield key, job.result(), place


def _told(name: str, row: str, seed: int) -> str:
    return f"{name}: {title(row)}, seed {seed}"
