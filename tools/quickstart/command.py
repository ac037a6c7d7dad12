"""Trains a dense, a top-k MoE and a ReMoE language model of equal active size on real text, and compares them."""

import argparse
import importlib.metadata
import os
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from ..common.files import lock, write_json
from ..common.places import ROOT
from ..common.running import run_to_the_end
from ..common.units import duration
from . import corpora, corpus, dataset, models, picture, report, stages, training
from .display import TrainingDisplay, Work, step

LEAST_ITERATIONS = 10


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; defaults come from the environment."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__)
    parser.add_argument(
        "--corpus",
        choices=corpora.CORPORA,
        default=corpora.MIXED,
        help="mixed: code, documentation and drama, 15 MB; technical: descriptions of web services, 43 MB "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help=f"where everything is written (default: {' or '.join(map(str, corpora.FOLDERS.values()))})",
    )
    parser.add_argument(
        "--iterations",
        default=os.environ.get("QUICKSTART_ITERS", str(models.ITERATIONS)),
        help=f"of each training (default: QUICKSTART_ITERS, or {models.ITERATIONS})",
    )
    parser.add_argument(
        "--threads",
        default=os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))),
        help="for the arithmetic (default: OMP_NUM_THREADS, or all cores)",
    )
    parser.add_argument("--seed", default=str(models.SEED), help="of the trainings (default: %(default)s)")
    args = parser.parse_args(arguments)
    for name, least, source in (
        ("iterations", LEAST_ITERATIONS, "--iterations or QUICKSTART_ITERS"),
        ("threads", 1, "--threads or OMP_NUM_THREADS"),
        ("seed", 1, "--seed"),
    ):
        text = getattr(args, name)
        if not text.isdecimal() or int(text) < least:
            parser.error(f"{source} is {text!r}: give a whole number of at least {least}.")
        setattr(args, name, int(text))
    args.output_dir = args.output_dir or ROOT / corpora.FOLDERS[args.corpus]
    return args


def plan(args: argparse.Namespace, runs: Path, data_folder: Path, data: dict[str, Any]) -> list[training.Training]:
    """Return the three trainings."""
    train_tokens = data["tokens"]["train"]
    sources = stages.fingerprint_of_files([ROOT / "pretrain_gpt.py", *(ROOT / "megatron" / "remoe").rglob("*.py")])
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "numpy")}
    trainings = []
    for model in models.NAMES:
        flags = models.common_flags(models.SIZE, args.iterations, args.seed) + models.model_flags(model, models.SIZE)
        placed = models.data_flags(data_folder, train_tokens) + models.output_flags(runs / model)
        trainings.append(
            training.Training(
                model=model,
                folder=runs / model,
                flags=flags + placed,
                iterations=args.iterations,
                evaluations=len(train_tokens),
                inputs=stages.fingerprint(data["inputs"], flags, sources, versions),
            )
        )
    return trainings


def train(
    console: Console, trainings: list[training.Training], held_out: dict[str, int], threads: int, held: IO[str]
) -> None:
    """Run the trainings that are not done yet, one after another."""
    works = [
        Work(
            title=models.NAMES[each.model],
            iterations=each.iterations,
            cost=models.RELATIVE_COST[each.model],
            evaluation=sum(held_out.values()) / models.SIZE.sequence / models.EVALUATED_PER_ITERATION,
            sets=len(held_out),
        )
        for each in trainings
    ]
    with TrainingDisplay(console, works) as display:
        for each, work in zip(trainings, works, strict=True):
            if each.is_done():
                display.finish(work, "reused")
            else:
                start = time.monotonic()
                training.run(each, display, work, threads, held)
                display.finish(work, f"trained in {duration(time.monotonic() - start)}")


def describe_corpus(manifest: dict[str, Any]) -> str:
    """Return one line with the domains and their sizes."""
    sizes = {name: part["train"]["bytes"] + part["heldout"]["bytes"] for name, part in manifest["domains"].items()}
    held_out = sum(part["heldout"]["bytes"] for part in manifest["domains"].values()) / sum(sizes.values())
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()) + f"; {held_out:.1%} held out"


def run(args: argparse.Namespace) -> int:
    """Do all steps; each reuses the results of an earlier call. Returns the exit code."""
    console = Console()
    output: Path = args.output_dir.resolve()
    runs = output if args.iterations == models.ITERATIONS else output / f"iterations-{args.iterations}"

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with lock(output, "quickstart") as held:
        threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
        title = f"Dense, top-k MoE and ReMoE of equal active size: {args.iterations} iterations each, {threads}"
        say(f"{title}, in {_short(output)}")
        with step(console, "corpus", "collecting text") as result:
            sources = corpora.CORPORA[args.corpus]()
            text = corpus.build(output / "corpus", lambda line: say(f"  {line}"), args.corpus, sources)
            result.append(describe_corpus(text) + " (reused)" * text["reused"])
        for domain, reason in text["missing"].items() if text["reused"] else ():
            say(f"  It was made without {domain}. To try again, remove {_short(output / 'corpus')}. {reason}")
        with step(console, "data set", "preprocessing") as result:
            data = dataset.build(output / "data", output / "corpus", text, args.threads)
            result.append(f"{sum(data['tokens']['train'].values()):,} training tokens" + " (reused)" * data["reused"])
        held_out = {
            domain: dataset.predicted_tokens(tokens, models.SIZE.sequence)
            for domain, tokens in data["tokens"]["heldout"].items()
        }
        trainings = plan(args, runs, output / "data", data)
        train(console, trainings, held_out, args.threads, held)
        with step(console, "report", "reading the figures") as result:
            found = {each.model: report.Run.read(each.folder) for each in trainings}
            summary = report.summarize(found, held_out, args.iterations, args.seed, models.SIZE)
            write_json(output / "summary.json", summary)
            try:
                picture.draw(output / "report.png", found, summary)
                result.append("table and picture")
            except Exception as error:  # the table does without it
                result.append(f"table; no picture: {type(error).__name__}: {error};")
    report.show(console, summary, _short(output), _short(runs))
    return 0


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> int:
    """Run the quickstart; returns the exit code."""
    args = parse_arguments()
    return run_to_the_end(lambda: run(args))
