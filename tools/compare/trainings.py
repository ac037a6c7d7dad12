"""Run the trainings of a comparison as processes, and collect their results."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
from ..sweep import results, stages, tiny
from ..sweep.plan import MATCHED, Run
from ..sweep.run_log import Outcome, is_finished, log_of
from . import router_figures
from .recipes import TUNED, Recipe, recipe_of, reference_of, title, tune
from .table import Result

SPLIT = "95,2.5,2.5"
EVALUATED = 64  # batches of each part
TUNING_SEED = 1233


class Processes:
    """Start sweeps and analyses as processes with one thread, and stop them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def train(
        self, folder: Path, text: Path, iterations: int, seed: int, options: Iterable[str], flags: Iterable[str]
    ) -> dict[Run, Outcome]:
        """Train the runs of one call of scripts/sweep.sh and return their outcomes.

        Args:
            folder: for the runs.
            text: the quickstart's data.
            iterations: of each run.
            seed: of each run.
            options: for scripts/sweep.sh.
            flags: for Megatron, after the options' own.

        Raises:
            ToolError: a run did not finish.
        """
        command = ["bash", str(ROOT / "scripts" / "sweep.sh"), "--tiny", "--train-iters", str(iterations)]
        command += ["--output-dir", str(folder), *options, "--", "--split", SPLIT, "--eval-iters", str(EVALUATED)]
        command += ["--seed", str(seed), *flags]
        self._run(command, tiny.text_in(text, text.parent.name), f"The logs: {log_of(folder / '*')}")
        return {row.run: row.outcome for row in results.rows_of(folder, []) if is_finished(row.outcome)}

    def analyze(self, run: Path, text: Path) -> router_figures.Figures:
        """Analyze a run with tools/analyze unless that is done; each held-out set of the text is a domain.

        Raises:
            ToolError: tools/analyze failed.
        """
        if not router_figures.has_analysis(run):
            sets = [str(index.with_suffix("")) for index in sorted(text.glob("heldout_*.idx"))]
            command = [sys.executable, str(ROOT / "tools" / "analyze"), "--load", str(run / "checkpoints")]
            command += ["--output-dir", str(run / "analysis"), "--sequences", str(router_figures.SEQUENCES)]
            command += ["--data-path", *sets]
            self._run(command, {}, f"The command: {shlex.join(command)}")
        return router_figures.read(run / "analysis")

    def _run(self, command: Sequence[str], settings: Mapping[str, str], where: str) -> None:
        """Run a command to its end.

        Args:
            command: program and arguments.
            settings: additional environment variables.
            where: the place of its log, for the error.

        Raises:
            ToolError: it failed.
        """
        if self._stopped:
            raise KeyboardInterrupt
        process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | dict(settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a second Ctrl-C would end it unsaved
        )
        self._running.add(process)
        if self._stopped:
            process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
        self._running.discard(process)
        if process.returncode and not self._stopped:
            raise ToolError(f"{errors.strip()}\n{where}")

    def stop(self) -> None:
        """End all processes; each saves a last checkpoint."""
        self._stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


def make_text(folder: Path, name: str, display: Display) -> Path:
    """Build a corpus and its data set, or reuse them, and return the data set's folder."""
    text = corpus.build(folder / "corpus", display.say, name, corpora.CORPORA[name]())
    dataset.build(folder / "data", folder / "corpus", text, threads=1)
    return folder / "data"


class Comparison:
    """The trainings of all corpora in a pool of processes.

    Attributes:
        recipes: corpus → tuned row → the chosen settings.
        results: corpus → row → seed → result.
    """

    def __init__(self, args: argparse.Namespace, output: Path, display: Display) -> None:
        self._args, self._output, self._display = args, output, display
        self._processes, self._failed = Processes(), list[str]()
        self._at_work: dict[Path, threading.Lock] = {}
        self._texts = {name: make_text(output / name, name, display) for name in args.corpora}
        self.recipes: dict[str, dict[str, Recipe]] = {name: {} for name in args.corpora}
        self.results: dict[str, dict[str, dict[int, Result]]] = {name: {} for name in args.corpora}

    def run(self) -> None:
        """Tune, train and analyze; an interruption makes the running trainings save a checkpoint.

        Raises:
            ToolError: some failed; the others have finished.
        """
        args, say = self._args, self._display.say
        corpora_of = [(name, row) for row in args.rows for name in args.corpora]
        with ThreadPoolExecutor(args.processes) as threads:
            try:
                tuned = [(name, row) for name, row in corpora_of if row in TUNED]
                for (name, row), recipe, _ in self._finished_jobs(threads, "tuning", self._tune, tuned):
                    self.recipes[name][row] = recipe
                    say(f"{_label(name, row)} is {recipe}")
                jobs = [
                    (name, row, seed)
                    for row in args.rows
                    for seed in args.seeds
                    for name in args.corpora
                    if row not in TUNED or row in self.recipes[name]
                ]
                for (name, row, seed), result, place in self._finished_jobs(threads, "training", self._train, jobs):
                    self.results[name].setdefault(row, {})[seed] = result
                    say(f"{_label(name, row, seed)}: {result.loss:.4f} {place}")
                jobs = [
                    (name, row, seed)
                    for name, rows in self.results.items()
                    for row, of in rows.items()
                    if args.analyze and router_figures.is_analyzed(self._recipe(name, row).run)
                    for seed in of
                ]
                for (name, row, seed), routing, place in self._finished_jobs(threads, "analyzing", self._analyze, jobs):
                    of = self.results[name][row]
                    of[seed] = replace(of[seed], routing=routing)
                    say(f"{_label(name, row, seed)}: tools/analyze {place}")
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._processes.stop()
                raise
        if self._failed:
            raise ToolError(
                "\n".join([f"{len(self._failed)} failed; the same command tries them again.", *self._failed])
            )

    def _finished_jobs[Key: tuple[Any, ...], Value](
        self, threads: ThreadPoolExecutor, what: str, work: Callable[..., Value], keys: Iterable[Key]
    ) -> Iterator[tuple[Key, Value, str]]:
        """Do work for each key, and yield key, result, and progress as text in the order in which jobs finish.

        Failed jobs are printed and left out.
        """
        jobs, began = {threads.submit(work, *key): key for key in keys}, time.monotonic()
        with self._display.step(what, len(jobs)):
            for number, job in enumerate(as_completed(jobs), start=1):
                self._display.advance(1)
                left = duration((time.monotonic() - began) / number * (len(jobs) - number))
                key, place = jobs[job], f"({number}/{len(jobs)}, {left} left)"
                if isinstance(error := job.exception(), ToolError):
                    self._failed.append(f"{_label(*key)}: {error}")
                    self._display.say(f"{_label(*key)}: failed {place}")
                else:
                    yield key, job.result(), place

    def _tune(self, name: str, row: str) -> Recipe:
        args, text = self._args, self._texts[name]

        def train(options: Sequence[str], flags: Sequence[str]) -> dict[Run, Outcome]:
            folder = self._output / name / row / ("together" if flags else "tuning")
            all_flags = [*flags, *args.flags]
            return self._processes.train(folder, text, args.tuning_iters, TUNING_SEED, options, all_flags)

        return tune(TUNED[row], train, parse(tiny.flags(SIZE, args.tuning_iters, os.environ)))

    def _train(self, name: str, row: str, seed: int) -> Result:
        args, recipe, folder = self._args, self._recipe(name, row), self._folder(name, row, seed)
        flags = [*recipe.flags, *args.flags]
        with self._at_work.setdefault(folder, threading.Lock()):
            found = self._processes.train(folder, self._texts[name], args.train_iters, seed, recipe.options(), flags)
        outcome = found[recipe.run]
        if outcome.test_loss is None:
            raise ToolError(f"{log_of(folder / recipe.run.name)}: has no loss on the test set.")
        return Result(
            outcome.test_loss,
            outcome.settled,
            outcome.flip_rate,
            outcome.flip_count,
            steps=outcome.train_iters,
            flops=stages.training_flops(folder / recipe.run.name),
            first_near=outcome.first_near,
            changed_tokens=outcome.changed_tokens,
        )

    def _analyze(self, name: str, row: str, seed: int) -> router_figures.Figures:
        run = self._recipe(name, row).run
        return self._processes.analyze(self._folder(name, row, seed) / run.name, self._texts[name])

    def _recipe(self, name: str, row: str) -> Recipe:
        return self.recipes[name][row] if row in TUNED else recipe_of(row)

    def _folder(self, name: str, row: str, seed: int) -> Path:
        """Return the folder of a run; a run of matched FLOPs shares it with its ReMoE."""
        reference = reference_of(row) if self._recipe(name, row).run.kind == MATCHED else row
        return self._output / name / reference / f"seed-{seed}"


def _label(name: str, row: str, seed: int | None = None) -> str:
    return f"{name}: {title(row)}" + (f", seed {seed}" if seed is not None else "")
