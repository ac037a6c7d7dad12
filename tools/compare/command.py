"""Compare dense, top-k, ReMoE and other routings on two corpora over several seeds, the top-k baseline tuned as well.

python tools/compare                                # all rows: hours on a CPU
python tools/compare --corpora mixed --rows dense moe remoe --seeds 1 2 3
python tools/compare --figures experts --experts 2 4 8 --routings moe remoe   # runs of a figure of scripts/sweep.sh

All runs are the quickstart's models, trained by scripts/sweep.sh --tiny; a text is split 95 : 2.5 : 2.5 by documents.
Settings are chosen on the second part, with a seed of their own: routing, granularity, coefficient of the auxiliary
loss, factor on the gates, learning rate, as far as a model has them. The losses shown are of the third part.
A run is compared with the ReMoE that has as many experts. Finished trainings are kept in --output-dir, and the same
command continues after a stop. The table also shows results of earlier calls with other seeds.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.display import Display
from ..common.files import lock
from ..common.flags import split, whole_number
from ..common.places import ROOT
from ..common.running import run_once
from ..quickstart import corpora, models
from ..quickstart.stages import fingerprint
from ..sweep.command import add_what_to_train, planned
from ..sweep.errors import SettingsError
from ..sweep.plan import AXES, COMPARED, FIGURES
from . import inside
from .kept import Kept
from .recipes import ROWS, row_of
from .table import STUDENT, markdown, verdicts
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
    parser.add_argument(
        "--analyze", action="store_true",
        help="also look into the routers with tools/analyze and the held-out sets, and show a table of what it finds",
    )  # fmt: skip
    add_what_to_train(parser, (*FIGURES, COMPARED, *AXES), "none")
    own, flags = split(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(own)
    args.flags = tuple(flags)
    args.figures = args.figures or []
    args.rows = [row for row in ROWS if row in (args.rows or ([] if args.figures else ROWS))]
    try:
        runs = planned(args) if args.figures else []
    except SettingsError as error:
        parser.error(str(error))
    args.rows += [row for row in map(row_of, runs) if row not in args.rows]
    args.seeds, args.corpora = list(dict.fromkeys(args.seeds)), list(dict.fromkeys(args.corpora))
    if len(args.seeds) > 1 + max(STUDENT):
        parser.error(f"--seeds: {len(args.seeds)} are more than the {1 + max(STUDENT)} that an interval is known for.")
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds {TUNING_SEED}: settings are chosen with it. Give another.")
    return args


def compare(args: argparse.Namespace, display: Display) -> None:
    """Train, show and write the results.

    Raises:
        ToolError: something failed; the message says what to do.
    """
    output = args.output_dir.expanduser().resolve()
    inputs = fingerprint("results", args.train_iters, args.tuning_iters, *args.flags)
    with lock(output, "comparison"):
        comparison = Comparison(args, output, display)
        found = {name: Kept.read(output / f"{name}.json", inputs) for name in args.corpora}
        try:
            comparison.run()
        finally:
            for name, kept in found.items():
                if not comparison.results[name]:
                    continue
                kept.add(comparison.results[name], comparison.recipes[name])
                kept.write(output / f"{name}.json")
                results = kept.of(args.rows)
                display.say("\n".join(["", f"{name}:", "", markdown(results, kept.tuned), "", *verdicts(results)]))
                if args.analyze:
                    display.say("\n".join(["", f"{name}, routers:", "", inside.markdown(results)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code: 0, 1 after an error, 130 after a stop."""
    args = parse_arguments(arguments)

    def work() -> None:
        with Display() as display:
            compare(args, display)

    return run_once("compare", work, "stopped; the same command goes on from here")
