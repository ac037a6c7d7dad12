"""Compare dense, top-k, ReMoE and other routings on two corpora over several seeds, the top-k baseline tuned as well.

python tools/compare                                # everything: hours on a CPU
python tools/compare --corpora mixed --rows dense moe remoe --seeds 1 2 3
python tools/compare --write-docs                   # put the tables into docs/paper.md

All runs are the quickstart's models, trained by scripts/sweep.sh --tiny; a text is split 95 : 2.5 : 2.5 by documents.
Settings are chosen on the second part with a seed of their own: routing, granularity, coefficient of the auxiliary
loss, factor on the gates, learning rate; of dense and ReMoE those that they have. The losses shown are of the third.
What is finished is kept in --output-dir, and the same command goes on where it was stopped.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from ..common.display import Display
from ..common.errors import ToolError
from ..common.files import lock, write_between
from ..common.flags import parse
from ..common.places import ROOT
from ..common.running import run_once
from ..common.units import duration
from ..quickstart import corpora, corpus, dataset, models
from ..quickstart.stages import write_json
from ..sweep import results, tiny
from ..sweep.plan import Run
from ..sweep.run_log import Outcome, log_of
from .recipes import ROWS, TUNED, Recipe, title, tune
from .table import STUDENT, markdown, verdicts

SPLIT = "95,2.5,2.5"
EVALUATED = 64  # batches of each part
TUNING_SEED = 1233
SEEDS = (1234, 1235, 1236)
PAGE = ROOT / "docs" / "paper.md"


def number_of(least: int) -> Callable[[str], int]:
    """A converter for argparse."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least {least}")
        return int(text)

    return convert


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpora", nargs="+", choices=corpora.CORPORA, default=[*corpora.CORPORA], help="default: both"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=f"default: all of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=number_of(1), default=[*SEEDS], metavar="N",
        help=f"of the trainings that are compared (default: {' '.join(map(str, SEEDS))})",
    )  # fmt: skip
    parser.add_argument(
        "--train-iters", type=number_of(1), default=models.ITERATIONS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--tuning-iters", type=number_of(1), default=models.ITERATIONS // 3, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--processes", type=number_of(1), default=len(os.sched_getaffinity(0)), metavar="N",
        help="trainings at once, of one thread each (default: the cores)",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "compare", metavar="FOLDER")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/paper.md")
    args = parser.parse_args(arguments)
    args.rows = [row for row in ROWS if row in args.rows]
    args.seeds = list(dict.fromkeys(args.seeds))
    if len(args.seeds) > 1 + max(STUDENT):
        parser.error(f"--seeds: {len(args.seeds)} are more than the {1 + max(STUDENT)} that an interval is known for.")
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: settings are chosen with it. Give another.")
    return args


class Sweeps:
    """Starts sweeps of a few runs as processes, and ends them when told to stop."""

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
        settings = (
            os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | tiny.text_in(text, text.parent.name)
        )
        if self._stopped:
            raise KeyboardInterrupt
        # Ctrl-C reaches it through `stop` alone: a second one would end it without a checkpoint.
        process = subprocess.Popen(
            command,
            env=settings,
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
            raise ToolError(f"{errors.strip()}\nThe logs: {log_of(folder / '*')}")
        rows = results.rows_of(folder, [])
        return {row.run: row.outcome for row in rows if row.outcome is not None and row.outcome.finished}

    def stop(self) -> None:
        """End all, after a last checkpoint each."""
        self._stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGTERM)


def make_text(folder: Path, name: str, display: Display) -> Path:
    """A corpus as the quickstart's data; reused where it is there."""
    text = corpus.build(folder / "corpus", display.say, corpora.CORPORA[name]())
    dataset.build(folder / "data", folder / "corpus", text, threads=1)
    return folder / "data"


class Comparison:
    """Trainings of all corpora, in a pool of processes, and what they came to so far."""

    def __init__(self, args: argparse.Namespace, output: Path, display: Display) -> None:
        self._args, self._output, self._display = args, output, display
        self._sweeps = Sweeps()
        self._texts = {name: make_text(output / name, name, display) for name in args.corpora}
        self.recipes: dict[str, dict[str, Recipe]] = {name: {} for name in args.corpora}
        self.losses: dict[str, dict[str, dict[int, float]]] = {name: {} for name in args.corpora}

    def run(self) -> None:
        """Tune, then train, each with all processes; what is under way is saved when this is interrupted.

        Raises:
            ToolError: a training failed.
        """
        args = self._args
        with ThreadPoolExecutor(args.processes) as threads:
            try:
                choices = {
                    threads.submit(self._tuned, name, row): (name, row)
                    for row in args.rows
                    if row in TUNED
                    for name in args.corpora
                }
                for choice in self._followed("tuning", choices):
                    name, row = choices[choice]
                    self.recipes[name][row] = choice.result()
                    self._display.say(f"{name}: {title(row)} is {self.recipes[name][row]}")
                jobs = {
                    threads.submit(self._trained, name, row, seed): (name, row, seed)
                    for row in args.rows
                    for seed in args.seeds
                    for name in args.corpora
                }
                began = time.monotonic()
                for number, job in enumerate(self._followed("training", jobs), start=1):
                    name, row, seed = jobs[job]
                    loss = self.losses[name].setdefault(row, {})[seed] = job.result()
                    left = duration((time.monotonic() - began) / number * (len(jobs) - number))
                    told = f"{loss:.4f} ({number}/{len(jobs)}, {left} left)"
                    self._display.say(f"{name}: {title(row)}, seed {seed}: {told}")
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._sweeps.stop()
                raise

    def table_of(self, name: str) -> str:
        """Of a corpus, the rows in their order."""
        return markdown({row: of for row in ROWS if (of := self.losses[name].get(row))}, self.recipes[name])

    def _tuned(self, name: str, row: str) -> Recipe:
        def train(options: Sequence[str], flags: Sequence[str]) -> dict[Run, Outcome]:
            folder = self._output / name / row / ("together" if flags else "tuning")
            return self._sweeps.train(folder, self._texts[name], self._args.tuning_iters, TUNING_SEED, options, flags)

        return tune(TUNED[row], train, parse(tiny.flags(self._args.tuning_iters, os.environ)))

    def _trained(self, name: str, row: str, seed: int) -> float:
        recipe, folder = self.recipes[name].get(row, Recipe(row)), self._output / name / row / f"seed-{seed}"
        (outcome,) = self._sweeps.train(
            folder, self._texts[name], self._args.train_iters, seed, recipe.options(), recipe.flags
        ).values()
        if outcome.test_loss is None:
            raise ToolError(f"{log_of(folder / '*')}: has no loss on the test set.")
        return outcome.test_loss

    def _followed[Result](self, what: str, jobs: Iterable[Future[Result]]) -> Iterable[Future[Result]]:
        """The jobs as they finish, with a bar."""
        waiting = list(jobs)
        with self._display.step(what, len(waiting)):
            for job in as_completed(waiting):
                self._display.advance(1)
                yield job


def compare(args: argparse.Namespace, display: Display) -> None:
    """Train, show, and write.

    Raises:
        ToolError: something is not as it must be.
    """
    output = args.output_dir.expanduser().resolve()
    message = f"Another comparison is at work in {output}. Wait for it, or give --output-dir another folder."
    with lock(output, ToolError(message)):
        comparison = Comparison(args, output, display)
        try:
            comparison.run()
        finally:
            for name in args.corpora:
                told = ["", f"{name}:", "", comparison.table_of(name), "", *verdicts(comparison.losses[name])]
                display.say("\n".join(told))
                recipes = {row: asdict(recipe) for row, recipe in comparison.recipes[name].items()}
                found = {"iterations": args.train_iters, "tuned": recipes, "losses": comparison.losses[name]}
                write_json(output / f"{name}.json", found)
    if args.write_docs:
        for name in args.corpora:
            marks = f"<!-- compare {name} -->", f"<!-- end of compare {name} -->"
            write_between(PAGE, *marks, f"\n{comparison.table_of(name)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1 if something is wrong; 130 if it was stopped."""
    args = parse_arguments(arguments)

    def work() -> None:
        with Display() as display:
            compare(args, display)

    return run_once("compare", work, "stopped; the same command goes on from here")
