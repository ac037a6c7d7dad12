"""Write one HTML file about one or more training runs. Double-click to open it; it needs no network.

remoe report runs/quickstart/remoe                                         # writes report.html there
remoe report runs/quickstart/{dense,moe,remoe} --output comparison.html    # compares them
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.remoe.files.files import write_text

from ..console.flags import tool_parser
from ..runs.figure_reader import read_figures
from ..runs.names import name_models
from ..runs.running import make_main


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags."""
    parser = tool_parser("report", __doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder or its --save")
    add("--output", type=Path, metavar="FILE", help="page to write (default: report.html in the first run's folder)")
    return parser.parse_args(arguments)


def report(args: argparse.Namespace) -> None:
    """Write the page.

    Raises:
        ToolError: a run has no log.
        OSError: a log cannot be read, or the page cannot be written.
    """
    from .page import page  # takes a moment to import

    places = list(dict.fromkeys(args.runs))
    output = args.output or (places[0] if places[0].is_dir() else places[0].parent) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)

    runs = [read_figures(place, name) for place, name in zip(places, name_models(places), strict=True)]
    write_text(output, page(runs))
    for run in runs:
        for note in run.notes:
            print(note, file=sys.stderr)
    print(output)


main = make_main("report", parse_arguments, report)
