"""Train a dense, a top-k MoE and a ReMoE language model of equal active size on real text, and compare them."""

import argparse
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron.remoe import megatron_version

from ..console.display import say
from ..console.errors import ToolError
from ..console.files import fingerprint, fingerprint_of_files, lock, write_json
from ..console.flags import number_of_cores, whole_number
from ..console.places import PACKAGE, home, short
from ..recipes import tiny
from ..runs.figure_reader import read_figures
from ..runs.running import run_tool
from ..text.corpora import corpus, dataset
from . import quickstart_picture, quickstart_report
from .execute import execute
from .jobs import Grid, make_job
from .run import Run, Text

LEAST_ITERATIONS = 10


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; defaults come from the environment."""
    parser = argparse.ArgumentParser(prog="remoe quickstart", description=__doc__)
    add = parser.add_argument
    text = "mixed: code, documentation and drama, 15 MB; technical: descriptions of web services, 43 MB"
    add("--corpus", choices=dataset.CORPORA, default=dataset.MIXED, help=f"{text} (default: %(default)s)")
    text = f"for all files (default: {' or '.join(map(str, dataset.FOLDERS.values()))} in the project's folder)"
    add("--output-dir", type=Path, metavar="FOLDER", help=text)
    text = f"optimizer steps of each run (default: QUICKSTART_ITERS, or {tiny.ITERATIONS})"
    iterations = os.environ.get("QUICKSTART_ITERS") or tiny.ITERATIONS
    add("--iterations", type=whole_number(LEAST_ITERATIONS), default=iterations, metavar="N", help=text)
    text = "of the runs (default: %(default)s)"
    add("--seed", type=whole_number(1), default=tiny.SEED, metavar="N", help=text)
    args = parser.parse_args(arguments)
    args.output_dir = args.output_dir or home() / dataset.FOLDERS[args.corpus]
    return args


def describe_corpus(manifest: dict[str, Any]) -> str:
    """Return one line with the domains and their sizes."""
    sizes = {name: part["train"]["bytes"] + part["heldout"]["bytes"] for name, part in manifest["domains"].items()}
    held_out = sum(part["heldout"]["bytes"] for part in manifest["domains"].values()) / sum(sizes.values())
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()) + f"; {held_out:.1%} held out"


def fingerprint_of_code() -> str:
    """Return a fingerprint of the project's code and of the packages that decide the last digit of a loss."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return fingerprint(fingerprint_of_files(PACKAGE.rglob("*.py")), versions | {"megatron-core": megatron_version()})


def run(args: argparse.Namespace) -> int:
    """Do all steps and return the exit code; each step reuses the results of an earlier call.

    Raises:
        ToolError: a run failed; the display has shown the end of its log.
    """
    console = Console()
    output: Path = args.output_dir.expanduser().resolve()
    runs = output if args.iterations == tiny.ITERATIONS else output / f"iterations-{args.iterations}"
    with lock(output, "quickstart") as held:
        title = f"Dense, top-k MoE and ReMoE of equal active size: {args.iterations} iterations each, side by side"
        say(console, f"{title}, in {short(output)}")
        sources = dataset.CORPORA[args.corpus]()
        text = corpus.build(output / "corpus", lambda line: say(console, f"  {line}"), args.corpus, sources)
        say(console, f"  corpus   {describe_corpus(text)}" + (" (reused)" if text["reused"] else ""))
        for domain, reason in text["missing"].items() if text["reused"] else ():
            say(console, f"  The corpus has no {domain}. To try again, remove {short(output / 'corpus')}. {reason}")
        data = dataset.build(output / "data", output / "corpus", text, number_of_cores())
        number = sum(data["tokens"]["train"].values())
        say(console, f"  data set {number:,} training tokens" + (" (reused)" if data["reused"] else ""))
        grid = Grid(runs, text=Text.read(output / "data"), code=fingerprint_of_code(), starts_over=True)
        jobs = [
            make_job(Run(model, args.seed, args.iterations), grid, folder=model, title=title)
            for model, title in tiny.NAMES.items()
        ]
        if execute(console, grid, jobs, len(jobs), held):
            raise ToolError("A run failed; see above. Fix the cause and run the same command: it goes on.")
        figures = {job.run.arm: read_figures(job.folder) for job in jobs}
        summary = quickstart_report.summarize(figures, args.iterations, args.seed, args.corpus)
        write_json(runs / "summary.json", summary)
        quickstart_picture.draw(runs / "report.png", figures, summary)
    quickstart_report.show(console, summary, output, runs)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the quickstart and return the exit code."""
    args = parse_arguments(arguments)
    return run_tool("quickstart", lambda: run(args), "stopped. The same command goes on from here")
