"""Train a dense, a top-k MoE and a ReMoE language model of equal active size on real text, and compare them."""

import argparse
import importlib.metadata
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from megatron.remoe import megatron_version

from ...console.display import say
from ...console.files import fingerprint, fingerprint_of_files, lock, write_json
from ...console.flags import number_of_cores, whole_number
from ...console.places import PACKAGE, home, short
from ...console.units import duration
from ...recipes import tiny
from ...runs.figure_reader import read_figures
from ...runs.running import run_tool
from ...runs.training_display import ShownTraining, TrainingDisplay
from ...text.corpora import corpus, dataset
from . import picture, report, training

LEAST_ITERATIONS = 10


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; defaults come from the environment."""
    parser = argparse.ArgumentParser(prog="remoe quickstart", description=__doc__)
    add = parser.add_argument
    text = "mixed: code, documentation and drama, 15 MB; technical: descriptions of web services, 43 MB"
    add("--corpus", choices=dataset.CORPORA, default=dataset.MIXED, help=f"{text} (default: %(default)s)")
    text = f"for all files (default: {' or '.join(map(str, dataset.FOLDERS.values()))} in the project's folder)"
    add("--output-dir", type=Path, metavar="FOLDER", help=text)
    text = f"optimizer steps of each training (default: QUICKSTART_ITERS, or {tiny.ITERATIONS})"
    iterations = os.environ.get("QUICKSTART_ITERS") or tiny.ITERATIONS
    add("--iterations", type=whole_number(LEAST_ITERATIONS), default=iterations, metavar="N", help=text)
    text = "of the trainings (default: %(default)s)"
    add("--seed", type=whole_number(1), default=tiny.SEED, metavar="N", help=text)
    args = parser.parse_args(arguments)
    args.output_dir = args.output_dir or home() / dataset.FOLDERS[args.corpus]
    return args


def plan(args: argparse.Namespace, runs: Path, data_folder: Path, data: dict[str, Any]) -> list[training.Training]:
    """Return the three trainings."""
    train_tokens = data["tokens"]["train"]
    sources = fingerprint_of_files(PACKAGE.rglob("*.py"))
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    versions["megatron-core"] = megatron_version()
    trainings = []
    for model in tiny.NAMES:
        flags = tiny.common_flags(tiny.SIZE, args.iterations, args.seed) + tiny.model_flags(model, tiny.SIZE)
        inputs = fingerprint(data["inputs"], flags, sources, versions)
        folder, checkpoints = runs / model, str(runs / model / "checkpoints")
        flags += dataset.data_flags(data_folder, train_tokens)
        flags += ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", str(folder / "tensorboard")]
        trainings.append(training.Training(model, folder, flags, len(train_tokens), inputs))
    return trainings


def train(console: Console, trainings: Sequence[training.Training], iterations: int, keep_open: IO[str]) -> None:
    """Run the trainings that are not done yet, side by side."""
    tokens, costs = tiny.SIZE.tokens_per_iteration, tiny.RELATIVE_COST
    shown = [ShownTraining(tiny.NAMES[each.model], iterations, tokens, costs[each.model]) for each in trainings]
    with TrainingDisplay(console, shown, keep_open) as display:

        def run(each: training.Training, line: ShownTraining) -> None:
            began = time.monotonic()
            if each.is_done():
                display.finish(line, "reused")
            else:
                training.run(each, display, line)
                display.finish(line, f"trained in {duration(time.monotonic() - began)}")

        jobs = [partial(run, each, line) for each, line in zip(trainings, shown, strict=True)]
        display.run_all(jobs, at_once=len(jobs))


@contextmanager
def step(console: Console, name: str, doing: str) -> Iterator[list[str]]:
    """Show a running step; at its end, print its time and the strings that were added to the yielded list."""
    result: list[str] = []
    began = time.monotonic()
    with console.status(f"{name:<8} {doing}"):
        yield result
    console.print(f"  {name:<8} {' '.join(result)} [dim]{duration(time.monotonic() - began)}[/dim]", highlight=False)


def describe_corpus(manifest: dict[str, Any]) -> str:
    """Return one line with the domains and their sizes."""
    sizes = {name: part["train"]["bytes"] + part["heldout"]["bytes"] for name, part in manifest["domains"].items()}
    held_out = sum(part["heldout"]["bytes"] for part in manifest["domains"].values()) / sum(sizes.values())
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()) + f"; {held_out:.1%} held out"


def run(args: argparse.Namespace) -> int:
    """Do all steps and return the exit code; each step reuses the results of an earlier call."""
    console = Console()
    output: Path = args.output_dir.expanduser().resolve()
    runs = output if args.iterations == tiny.ITERATIONS else output / f"iterations-{args.iterations}"
    with lock(output, "quickstart") as keep_open:
        title = f"Dense, top-k MoE and ReMoE of equal active size: {args.iterations} iterations each, side by side"
        say(console, f"{title}, in {short(output)}")
        with step(console, "corpus", "collecting text") as result:
            sources = dataset.CORPORA[args.corpus]()
            text = corpus.build(output / "corpus", lambda line: say(console, f"  {line}"), args.corpus, sources)
            result.append(describe_corpus(text) + (" (reused)" if text["reused"] else ""))
        for domain, reason in text["missing"].items() if text["reused"] else ():
            say(console, f"  The corpus has no {domain}. To try again, remove {short(output / 'corpus')}. {reason}")
        with step(console, "data set", "preprocessing") as result:
            data = dataset.build(output / "data", output / "corpus", text, number_of_cores())
            number = sum(data["tokens"]["train"].values())
            result.append(f"{number:,} training tokens" + (" (reused)" if data["reused"] else ""))
        trainings = plan(args, runs, output / "data", data)
        train(console, trainings, args.iterations, keep_open)
        with step(console, "report", "reading the figures") as result:
            found = {each.model: read_figures(each.folder) for each in trainings}
            summary = report.summarize(found, args.iterations, args.seed, args.corpus)
            write_json(runs / "summary.json", summary)
            picture.draw(runs / "report.png", found, summary)
            result.append("table and picture")
    report.show(console, summary, output, runs)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the quickstart and return the exit code."""
    args = parse_arguments(arguments)
    return run_tool("quickstart", lambda: run(args), "stopped. The same command goes on from here")
