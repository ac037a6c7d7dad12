"""Share the work of commands that train a grid of runs: options, the list of commands, training, and results."""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console

from megatron.remoe.files.files import write_text

from ..console.display import say
from ..console.errors import ToolError
from ..console.files import lock
from ..console.flags import number_of_cores, split, tool_parser, whole_number
from ..console.places import home
from ..recipes.data import is_set
from ..runs.running import run_tool
from ..text.corpora import dataset
from .execute import command_line, execute
from .results import Row, read_folder, read_results, write_results
from .run import Run, Text, check_flags
from .run_folders import Grid, RunFolder, check_conflicts, make_run_folder

NOT_FINITE = {16, 17}  # Megatron's exit codes after NaN or Inf (core/rerun_state_machine.py)


def grid_parser(name: str, description: str | None, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """Return a parser with the options that all grids share."""
    parser = tool_parser(name, description)
    parser.usage = "%(prog)s [options] [-- Megatron flags]"
    add, default = parser.add_argument, "(default: %(default)s)"
    text = f"seeds, each a run (default: {' '.join(map(str, seeds))})"
    add("--seeds", nargs="+", type=whole_number(1), default=[*seeds], metavar="N", help=text)
    add("--corpus", choices=dataset.CORPORA, default=dataset.MIXED, help=f"text of tiny models {default}")
    text = "folder of the corpus and its data sets (default: the quickstart's)"
    add("--text-dir", type=Path, metavar="FOLDER", help=text)
    text = "tokens of tiny models: bytes, or a BPE of 4,096 subwords that is trained on the text; losses are per byte"
    add("--tokens", choices=dataset.TOKENS, default=dataset.BYTES, help=f"{text} {default}")
    text = "number of tiny models to train at once, with one thread each (default: the number of cores)"
    add("--processes", type=whole_number(1), default=number_of_cores(), metavar="N", help=text)
    text = f"for the runs and the results (default: runs/{name})"
    add("--output-dir", type=Path, default=home() / "runs" / name, metavar="FOLDER", help=text)
    add = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    add("--collect", action="store_true", help="only write the table of the output folder, and the picture")
    text = "make the page of one or more results.json, with the flags of their runs"
    add("--results", type=Path, nargs="+", metavar="FILE.json", help=text)
    text = "list the commands of the next runs (also with DRY_RUN=1)"
    add("--dry-run", action="store_true", default=is_set(os.environ, "DRY_RUN"), help=text)
    return parser


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words after -- become `flags`."""
    before, flags = split(words)
    args = parser.parse_args(before)
    args.flags, args.seeds = tuple(flags), [*dict.fromkeys(args.seeds)]
    args.output_dir = args.output_dir.expanduser().resolve()
    return args


def prepare_text(args: argparse.Namespace) -> Text:
    """Return the text of tiny runs; build it if missing.

    Raises:
        ToolError: the folder holds something else.
    """
    folder = (args.text_dir or home() / dataset.FOLDERS[args.corpus]).expanduser().resolve()
    data, corpus = folder / dataset.TOKENS[args.tokens], folder / "corpus" / "manifest.json"
    if not (corpus.exists() and (data / "manifest.json").exists()):
        with lock(folder, "quickstart"):
            dataset.make_text(folder, args.corpus, args.tokens)
    for line in dataset.missing_domains(folder):
        say(Console(stderr=True), line)
    try:
        text, made = Text.read(data), json.loads(corpus.read_text(encoding="utf-8"))
        domains = {*made["domains"], *made["missing"]}
    except (ValueError, KeyError) as error:
        raise ToolError(f"{folder}: not a text of this version ({error}). Remove it, or give --text-dir.") from None
    if domains != {*dataset.CORPORA[args.corpus]()}:
        raise ToolError(
            f"--corpus {args.corpus}: {folder} holds the domains {', '.join(sorted(domains))}. Give --text-dir."
        )
    return text


def run_grid(
    name: str,
    args: argparse.Namespace,
    rounds: Callable[[], Iterable[Sequence[Run]]],
    show: Callable[[Sequence[Row]], None],
) -> int:
    """Do what the command line asks for and return the exit code. Show the results also after an interruption.

    Args:
        name: of the command.
        args: the command line.
        rounds: returns lists of runs; each list is requested when the runs of the previous list are done.
        show: writes the page of all runs.
    """

    def work() -> int:
        console, folder = Console(), args.output_dir
        if args.collect or args.results:
            show_finished(args, read_folder(folder), show)
            return 0
        grid = Grid(folder, prepare_text(args), args.flags)
        folders_by_round = make_run_folders(rounds(), grid)
        if args.dry_run:
            list_commands(folders_by_round)
            return 0
        with lock(folder, name) as held:
            try:
                failed = train(folders_by_round, grid, args.processes, held, console)
            finally:
                show(read_folder(folder))
        if failed:
            message = f"Not finished: {', '.join(failed)}.\nRemove the cause; the same command continues."
            say(Console(stderr=True), message, "red")
        return 1 if failed else 0

    return run_tool(name, work, "stopped. The same command continues from here")


def show_finished(args: argparse.Namespace, rows: Sequence[Row], show: Callable[[Sequence[Row]], None]) -> None:
    """Show `rows`, or those of the files in --results. Raise ToolError if there are none."""
    if args.results:
        rows = [row for file in args.results for row in read_results(file)]
    if not rows:
        raise ToolError(f"--output-dir {args.output_dir}: there are no runs. Give the folder of the runs.")
    show(rows)


def make_run_folders(rounds: Iterable[Sequence[Run]], grid: Grid) -> Iterator[list[RunFolder]]:
    """Yield the runs of each round with their folders. A round is requested when the previous one has been used."""
    for runs in rounds:
        check_flags(grid.flags, runs)
        yield [make_run_folder(run, grid) for run in runs]


def list_commands(rounds: Iterable[Sequence[RunFolder]]) -> None:
    """Print the commands of the unfinished runs of the first round that has some.

    Later rounds depend on its results.
    """
    for folders in rounds:
        check_conflicts(folders)
        if lines := [command_line(folder) for folder in folders if folder.read_loss() is None]:
            print(*lines, sep="\n")
            return


def train(
    rounds: Iterable[Sequence[RunFolder]], grid: Grid, processes: int, held: IO[str], console: Console
) -> list[str]:
    """Train the runs of all rounds, and return the names of those that failed.

    A tuning run may end with NaN or Inf if other runs of its arm do not. After other failures no round follows, because
    it would depend on them.
    """
    failed: list[str] = []
    for folders in rounds:
        done = sum(folder.read_loss() is not None for folder in folders)
        say(console, f"{len(folders)} runs in {grid.output}: {done} finished; {len(folders) - done} to train.")
        ended = execute(console, grid, folders, processes, held)
        if not ended:
            continue
        tuning = [folder for folder in folders if folder.run.is_tuning]
        arms = {(folder.run.experts, folder.run.arm) for folder in tuning}
        tuned = {(folder.run.experts, folder.run.arm) for folder in tuning if folder.read_loss() is not None}
        must_stop = tuned < arms or not {*ended.values()} <= NOT_FINITE
        if must_stop or not tuning:
            failed += ended
        if must_stop:
            break
        say(console, f"NaN or Inf; continues without {', '.join(ended)}.", "red")
    return failed


def write_page(
    args: argparse.Namespace, rows: Sequence[Row], lines: Sequence[str], draw: Callable[[Path], None] | None
) -> None:
    """Write results.json, results.md and, with `draw`, results.png; print the tables and the paths.

    Args:
        args: the command line. With `args.results`, results.json is not written.
        rows: all runs.
        lines: the tables, in Markdown.
        draw: writes the picture; None without losses.
    """
    console, folder = Console(), args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    page, image = folder / "results.md", folder / "results.png"
    written = [page, image] if draw else [page]
    if args.results is None:
        written.append(folder / "results.json")
        write_results(written[-1], rows)
    unfinished = [
        f"- {run.name}: not finished" + (f", at iteration {result.iterations} of {run.steps}" if result else "")
        for run, result in rows
        if result is None or result.loss is None
    ]
    text = "\n".join([*lines, "", *unfinished])
    write_text(page, f"# Results\n\n{text}\n" + ("\n![Losses](results.png)\n" if draw else ""))
    if draw:
        draw(image)
    say(console, f"\n{text}\n")
    for path in written:
        say(console, f"  {path}")
