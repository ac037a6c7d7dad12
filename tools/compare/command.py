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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ..common.display import Display
from ..common.errors import ToolError
from ..common.files import lock, write_between
from ..common.places import ROOT
from ..common.running import run_once
from ..quickstart import corpora, models
from ..quickstart.stages import fingerprint, read_stamp, write_json
from ..sweep.command import whole_number
from .recipes import ROWS, Recipe
from .table import STUDENT, Losses, verdicts
from .trainings import TUNING_SEED, Comparison

SEEDS = (1234, 1235, 1236)
PAGE = ROOT / "docs" / "paper.md"


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
        "--seeds", nargs="+", type=whole_number(1), default=[*SEEDS], metavar="N",
        help=f"of the trainings that are compared (default: {' '.join(map(str, SEEDS))})",
    )  # fmt: skip
    parser.add_argument(
        "--train-iters", type=whole_number(1), default=models.ITERATIONS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--tuning-iters", type=whole_number(1), default=models.ITERATIONS // 3, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--processes", type=whole_number(1), default=len(os.sched_getaffinity(0)), metavar="N",
        help="trainings at once, of one thread each (default: the cores)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "runs" / "compare", metavar="FOLDER",
        help="a folder for each training, and the losses of a corpus as .json (default: runs/compare)",
    )  # fmt: skip
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/paper.md")
    args = parser.parse_args(arguments)
    args.rows = [row for row in ROWS if row in args.rows]
    args.seeds, args.corpora = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.corpora))
    if len(args.seeds) > 1 + max(STUDENT):
        parser.error(f"--seeds: {len(args.seeds)} are more than the {1 + max(STUDENT)} that an interval is known for.")
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: settings are chosen with it. Give another.")
    return args


def keep(path: Path, args: argparse.Namespace, losses: Losses, recipes: Mapping[str, Recipe]) -> None:
    """Write what was found beside what earlier calls with as many iterations found.

    The file holds "tuned" (row → its `Recipe`) and "losses" (row → seed → nats per byte).
    """
    inputs = fingerprint(args.train_iters, args.tuning_iters)
    before = read_stamp(path, inputs) or {"tuned": {}, "losses": {}}
    tuned = before["tuned"] | {row: asdict(recipe) for row, recipe in recipes.items()}
    by_row = dict(before["losses"])
    for row, by_seed in losses.items():
        by_row[row] = by_row.get(row, {}) | {str(seed): by_seed[seed] for seed in sorted(by_seed)}
    write_json(path, {"inputs": inputs, "iterations": args.train_iters, "tuned": tuned, "losses": by_row})


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
            for name in filter(comparison.losses.get, args.corpora):
                told = ["", f"{name}:", "", comparison.table_of(name), "", *verdicts(comparison.losses[name])]
                display.say("\n".join(told))
                keep(output / f"{name}.json", args, comparison.losses[name], comparison.recipes[name])
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
