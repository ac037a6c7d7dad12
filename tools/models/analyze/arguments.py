"""Show how a model routes held-out text: figures 7, 8, 9, 11, 12 and table 12 of the paper.

remoe analyze --load RUN --data-path SET [SET...]        # RUN: a run, or a folder of remoe export

Each data set is one domain. A .json and a .png of each analysis are written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...console.flags import tool_parser, whole_number


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags."""
    parser = tool_parser("analyze", __doc__)
    folder: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    number: dict[str, Any] = {"type": whole_number(1), "metavar": "N"}
    add = parser.add_argument
    add("--load", **folder, required=True, help="a run's folder, its --save, or an exported folder")
    add("--ckpt-step", type=int, metavar="N", help="iteration of a run (default: the newest)")
    add("--data-path", nargs="+", required=True, metavar="PREFIX", help="data sets, one for each domain")
    add("--output-dir", **folder, help="default: analysis/ in that of --load")
    length = "as in training (default: the model's context)"
    add("--seq-length", **number, help=length)
    add("--sequences", **number, help="at most, per data set (default: all)")
    add("--seed", type=int, default=1234, help="order of the sequences (default: %(default)s)")
    add("--tokenizer-model", **folder, help="use another tokenizer than the model's")
    args = parser.parse_args(arguments)
    places = [Path(prefix).resolve() for prefix in args.data_path]
    if twice := [prefix for prefix, place in zip(args.data_path, places, strict=True) if places.count(place) > 1]:
        parser.error(f"--data-path {twice[0]}: is given more than once. Give each data set once.")
    args.output_dir = args.output_dir or args.load / "analysis"
    return args
