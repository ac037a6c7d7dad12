"""Compare dense, top-k, ReMoE and other routings on two corpora over several seeds.

python tools/compare                                # all rows: hours on a CPU
python tools/compare --corpora mixed --rows dense moe remoe --seeds 1 2 3
python tools/compare --figures experts --experts 2 4 8 --routings moe remoe   # runs of a figure of scripts/sweep.sh

All runs train the quickstart's models with scripts/sweep.sh --tiny. The documents are split 95 : 2.5 : 2.5.
Rows named tuned-* are tuned on the second part with a separate seed: routing, granularity, coefficient of the
auxiliary loss, factor on the gates and learning rate, where the model has them. The table shows losses on the third
part. Each run is compared with the ReMoE that has equally many experts. Finished trainings stay in --output-dir: the
same command continues after a stop, and the table includes the seeds of earlier calls.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.display import Display
from ..common.files import lock
from ..common.flags import above_zero, split, whole_number
from ..common.places import ROOT
from ..common.running import run_once
from ..quickstart import corpora, models
from ..quickstart.stages import fingerprint
from ..recipes.layout import RecipeError
from ..sweep.command import add_what_to_train, planned
from ..sweep.plan import AXES, COMPARED, FIGURES
from . import router_figures
from .recipes import ROWS, row_of
from .saved_results import SavedResults
from .table import markdown, verdicts
from .trainings import TUNING_SEED, Comparison

SEEDS = (1234, 1235, 1236)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/compare",
        usage="%(prog)s [options] [-- Megatron flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--corpora", nargs="+", choices=corpora.CORPORA, default=[*corpora.CORPORA], help="default: both"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW",
        help=f"default: none with --figures, else all of {', '.join(ROWS)}",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", nargs="+", type=whole_number(1), default=[*SEEDS], metavar="N",
        help=f"of the compared trainings (default: {' '.join(map(str, SEEDS))})",
    )  # fmt: skip
    parser.add_argument(
        "--train-iters", type=whole_number(1), default=models.ITERATIONS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--tuning-iters", type=whole_number(1), default=models.ITERATIONS // 3, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--processes", type=whole_number(1), default=len(os.sched_getaffinity(0)), metavar="N",
        help="number of parallel trainings, with one thread each (default: the number of cores)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, default=ROOT / "runs" / "compare", metavar="FOLDER",
        help="for a folder of each training, and a .json file with the losses of each corpus (default: runs/compare)",
    )  # fmt: skip
    parser.add_argument(
        "--margin", type=above_zero, default=0.01, metavar="NATS",
        help="largest difference of two losses that counts as none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--analyze", action="store_true",
        help="also run tools/analyze on the held-out sets, and show a table of its figures",
    )  # fmt: skip
    add_what_to_train(parser, (*FIGURES, COMPARED, *AXES), "none")
    own, flags = split(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(own)
    args.flags = tuple(flags)
    args.figures = args.figures or []
    args.rows = [row for row in ROWS if row in (args.rows or ([] if args.figures else ROWS))]
    try:
        runs = planned(args) if args.figures else []
    except RecipeError as error:
        parser.error(str(error))
    args.rows += [row for row in map(row_of, runs) if row not in args.rows]
    args.seeds, args.corpora = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.corpora))
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: reserved for tuning. Give another one.")
    return args


def compare(args: argparse.Namespace, display: Display) -> None:
    """Train, and print and write the results.

    Raises:
        ToolError: something failed; the message names the remedy.
    """
    output = args.output_dir.expanduser().resolve()
    inputs = fingerprint("results", args.train_iters, args.tuning_iters, *args.flags)
    with lock(output, "comparison"):
        comparison = Comparison(args, output, display)
        found = {name: SavedResults.read(output / f"{name}.json", inputs) for name in args.corpora}
        try:
            comparison.run()
        finally:
            for name, kept in found.items():
                if not comparison.results[name]:
                    continue
                kept.add(comparison.results[name], comparison.recipes[name])
                kept.write(output / f"{name}.json")
                results = kept.of(args.rows)
                display.say(
                    "\n".join(["", f"{name}:", "", markdown(results, kept.tuned), "", *verdicts(results, args.margin)])
                )
                if args.analyze:
                    display.say("\n".join(["", f"{name}, routers:", "", router_figures.markdown(results)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and return the exit code: 0, 1 after an error, 130 after a stop."""
    args = parse_arguments(arguments)

    def work() -> None:
        with Display() as display:
            compare(args, display)

    return run_once("compare", work, "stopped; the same command goes on from here")
