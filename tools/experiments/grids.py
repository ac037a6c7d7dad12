"""Share what the commands over grids of runs do: options, the list of commands, training, and the results."""

import argparse
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from megatron.remoe.files.files import write_text

from ..console.display import say
from ..console.files import lock
from ..console.flags import above_zero, number_of_cores, split, whole_number
from ..console.places import home
from ..recipes.data import is_set
from ..recipes.layout import RecipeError
from ..text.corpora import dataset
from .execute import execute, queued_jobs, sbatch_command, state
from .jobs import Grid, Job, check_conflicts
from .pictures import Panel, draw
from .results import Row, read_folder, read_results, write_results
from .run import Text
from .significance import MARGIN

LABEL = "validation loss (nats per token)"


def add_options(parser: argparse.ArgumentParser, name: str, seeds: Sequence[int]) -> None:
    """Add the options of every grid; `name` is that of the default folder."""
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--seeds", nargs="+", type=whole_number(1), default=[*seeds], metavar="N", help=f"a run each {default}")
    add("--corpus", choices=dataset.CORPORA, default=dataset.MIXED, help=f"text of tiny models {default}")
    text = "folder of the corpus and its data sets (default: the quickstart's)"
    add("--text-dir", type=Path, metavar="FOLDER", help=text)
    text = "bytes, or a BPE of 4,096 subwords that is trained on the text; losses are per byte"
    add("--tokens", choices=dataset.TOKENS, default=dataset.BYTES, help=f"of tiny models: {text} {default}")
    text = "runs of one thread each at once, for tiny models (default: the number of cores)"
    add("--processes", type=whole_number(1), default=number_of_cores(), metavar="N", help=text)
    text = f"for the runs and the results (default: OUTPUT_DIR, or runs/{name})"
    output = Path(os.environ.get("OUTPUT_DIR") or home() / "runs" / name)
    add("--output-dir", type=Path, default=output, metavar="FOLDER", help=text)
    text = "losses that differ by less count as equal"
    add("--margin", type=above_zero, default=MARGIN, metavar="NATS", help=f"{text} {default}")
    add = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    add("--collect", action="store_true", help="only write the table of the output folder, and the picture")
    add("--results", type=Path, metavar="FILE.json", help="show the results.json of another folder")
    text = "list commands and state (also with DRY_RUN=1)"
    add("--dry-run", action="store_true", default=is_set(os.environ, "DRY_RUN"), help=text)


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    before, flags = split(words)
    args = parser.parse_args(before)
    args.flags, args.seeds = tuple(flags), [*dict.fromkeys(args.seeds)]
    args.output_dir = args.output_dir.expanduser().resolve()
    return args


def prepare_text(args: argparse.Namespace, console: Console) -> Text:
    """Return the text of tiny runs; make it if it is not there, unless nothing is run."""
    folder = (args.text_dir or home() / dataset.FOLDERS[args.corpus]).expanduser().resolve()
    place = folder / dataset.TOKENS[args.tokens]
    if not args.dry_run and not (place / "manifest.json").exists():
        with lock(folder, "quickstart"):
            dataset.make_text(folder, args.corpus, lambda line: say(console, line), args.tokens)
    return Text.read(place)


def read_rows(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Return the runs in the output folder, or in the file of --results.

    Raises:
        RecipeError: there is none.
    """
    rows = read_results(args.results) if args.results else read_folder(folder)
    if not rows:
        raise RecipeError(f"--output-dir {folder}: no runs are there.")
    return rows


def train_rounds(
    args: argparse.Namespace,
    console: Console,
    grid: Grid,
    rounds: Iterable[Sequence[Job]],
    tool: str,
    show: Callable[[], None],
) -> int:
    """Train lists of runs one after another, and show the results, also after an interruption; return the exit code.

    Args:
        args: the command line.
        console: to print to.
        grid: of the runs.
        rounds: each list is asked for when the runs before it are done.
        tool: name of the command.
        show: writes and prints the results.
    """
    if args.dry_run:
        for jobs in rounds:
            check_conflicts(jobs)
            list_commands(jobs, grid)
            break  # the others depend on its results
        return 0
    failed: list[str] = []
    with lock(grid.output, tool) as held:
        try:
            for jobs in rounds:
                done = sum(job.is_done for job in jobs)
                doing = "train" if grid.sbatch_flags is None else "submit or wait for"
                say(console, f"{len(jobs)} runs in {grid.output}: {done} finished; {len(jobs) - done} to {doing}.")
                failed = execute(console, grid, jobs, args.processes, held)
                if failed:
                    break  # later runs depend on these
        finally:
            show()
    if failed:
        text = f"{len(failed)} runs did not finish: {', '.join(failed)}."
        say(Console(stderr=True), f"{text}\nThe same command continues them.", "red")
    return 1 if failed else 0


def list_commands(jobs: Sequence[Job], grid: Grid) -> None:
    """Print the state and the command of each run, in a form that a shell can read."""
    queued = {} if grid.sbatch_flags is None else queued_jobs()
    states = [state(job, queued) for job in jobs]
    for job, now in zip(jobs, states, strict=True):
        print(f"# {job.title}: {now}")
        words = job.words if grid.sbatch_flags is None else sbatch_command(job, grid)
        print(
            " ".join([*(f"{name}={shlex.quote(value)}" for name, value in job.environment.items()), shlex.join(words)])
        )
    print(f"# to train: {sum(now != 'finished' for now in states)} runs")


def write_page(
    console: Console,
    folder: Path,
    rows: Sequence[Row],
    lines: Sequence[str],
    panels: Sequence[Panel],
    label: str = LABEL,
    margin: float = 0.0,
) -> None:
    """Write results.json, results.md and, if there are panels, results.png; print the tables and the paths.

    Args:
        console: to print to.
        folder: for the files.
        rows: all runs.
        lines: of the tables.
        panels: of the picture; `label` and `margin` as in `draw`.
    """
    written = [folder / name for name in ("results.json", "results.md", "results.png")]
    write_results(written[0], rows)
    unfinished = [
        f"- {run.name}: not finished"
        + (f", at iteration {result.iterations} of {result.train_iters}" if result else "")
        for run, result in rows
        if result is None or not result.is_finished
    ]
    panels = [panel for panel in panels if panel.lines]
    text = "\n".join([*lines, "", *unfinished])
    write_text(written[1], f"# Results\n\n{text}\n" + ("\n![Losses](results.png)\n" if panels else ""))
    if panels:
        draw(written[2], panels, label, margin)
    say(console, f"\n{text}\n")
    for path in written if panels else written[:2]:
        say(console, f"  {path}")
