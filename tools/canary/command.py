"""Run what can be run of this project against other versions of Megatron, and say what they would break.

Each PATH is a Megatron-LM checkout or a wheel of megatron-core; neither it nor the environment is touched.
"""

import argparse
import tempfile
import time
from pathlib import Path

from ..common.display import Display
from ..common.errors import ToolError
from ..common.files import write_between
from ..common.places import ROOT
from ..common.running import run_once
from .candidate import Candidate, candidate, installed
from .checks import CHECKS, Result
from .comparison import Comparison
from .report import BEGIN, END, Found, markdown
from .uses import sources, uses

PAGE = ROOT / "docs" / "megatron_versions.md"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/canary.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a checkout or a wheel")
    names = "; ".join(CHECKS)
    parser.add_argument(
        "--checks", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=f"some of: {names}"
    )
    parser.add_argument(
        "--write", action="store_true", help=f"put the tables, side by side, into {PAGE.relative_to(ROOT)}"
    )
    return parser


def main() -> int:
    """Exit code: 0; 1 if anything fails, did not run or is wrong; 130 if it was stopped."""
    parser = build_parser()
    options = parser.parse_args()
    if options.write and len(options.checks) < len(CHECKS):
        parser.error("--write needs all checks: leave out --checks.")
    found: list[Found] = []

    def work() -> None:
        with Display() as display, tempfile.TemporaryDirectory(prefix="canary-") as folder:
            copies = Path(folder).resolve()
            others = [candidate(path, copies / str(number)) for number, path in enumerate(options.paths)]
            found.extend(look_at(other, options.checks, display) for other in others)
        if options.write:
            write_between(PAGE, BEGIN, END, markdown(installed(), found))

    code = run_once("canary", work)
    return code or int(any(result.state != "passes" for _, results, _ in found for result in results.values()))


def look_at(other: Candidate, checks: list[str], display: Display) -> Found:
    """Run the checks on one, and say of each how it went."""
    base = installed()
    display.say(f"megatron-core {other.version} {other.date} beside {base.version}, which is installed")
    comparison = Comparison(uses(sources()), base, other)
    results: dict[str, Result] = {}
    with display.step(other.version, len(checks)):
        for name in checks:
            start = time.monotonic()
            try:
                results[name] = result = CHECKS[name](comparison)
            except ToolError as error:
                results[name] = result = Result([str(error)])
            display.say(f"  {name:22} {result.state:12} {time.monotonic() - start:4.0f} s  {result.said}")
            for problem in result.problems:
                display.say(f"    {problem}")
            display.advance(1)
    try:
        changes = comparison.changes()
    except ToolError:
        changes = []  # the checks have said why
    display.say(f"  changed of what this project takes from Megatron: {len(changes)}")
    for change in changes:
        display.say(f"    {change.place}: {change.what}: {change.how}")
    return other, results, changes
