"""Train one small model in every layout and say how far each is from one process (docs/parallelism.md)."""

import argparse
import sys
import time
from pathlib import Path

from ..common.data_sets import write_real_text
from ..common.files import write_between
from ..common.places import ROOT
from .layouts import LAYOUTS, ROUTINGS, VARIANTS, Layout
from .measure import Difference, TrainingFailed, compare, train

STEPS = 20
# fp32: sums in another order. bf16: every activation is rounded to 8 bits, in other places in each layout.
TOLERANCES = {"bf16": (2e-2, 1e-1)}
TOLERANCE = (1e-4, 1e-4)  # of loss and gradient
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/parity", description=__doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="default: both")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "parity", help="default: runs/parity")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/parallelism.md")
    return parser


def slug(*words: str) -> str:
    """A folder's name."""
    return "-".join(
        "".join(c if c.isalnum() else " " for c in word).replace("  ", " ").replace(" ", "_") for word in words
    )


def shown(difference: Difference | None, variant: str) -> str:
    """A cell of the table: the differences of loss and gradient, and whether all is within tolerance."""
    if difference is None:
        return "failed"
    loss, gradient = TOLERANCES.get(variant, TOLERANCE)
    good = difference.loss < loss and difference.gradient < gradient
    if variant != "bf16":
        good = good and difference.counts_equal is not False and difference.exponents_equal is not False
    return f"{difference.loss:.0e} / {difference.gradient:.0e}" + ("" if good else " **!**")


def main() -> int:
    """Run, print and write the tables; returns 1 if anything is out of tolerance."""
    options = build_parser().parse_args()
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    if not data.with_suffix(".idx").exists():
        write_real_text(data)
    tables, failures, start = [], [], time.monotonic()
    single = Layout(1, [])
    for routing in options.routings:
        cells: dict[str, dict[str, Difference | None]] = {layout: {} for layout in options.layouts}
        for variant in options.variants:
            initial = folder / slug(routing, variant, "initial")
            begin = ["--train-iters", "1", "--save", str(initial / "checkpoint"), "--save-interval", "1"]
            train(initial, data, single, routing, variant, *begin)
            more = ["--train-iters", str(STEPS), "--load", str(initial / "checkpoint"), "--finetune"]
            expected = train(folder / slug(routing, variant, "one"), data, single, routing, variant, *more)
            for name in options.layouts:
                try:
                    found = train(folder / slug(routing, variant, name), data, LAYOUTS[name], routing, variant, *more)
                    difference = compare(found, expected)
                except TrainingFailed as failure:
                    difference = None
                    failures.append(f"{routing}, {variant}, {name}: {failure}")
                cells[name][variant] = difference
                cell = shown(difference, variant)
                if cell.endswith("!**") or difference is None:
                    failures.append(f"{routing}, {variant}, {name}: {difference}")
                print(f"{time.monotonic() - start:6.0f} s  {routing}, {variant}, {name}: {difference}", flush=True)
        tables.append(table(routing, options.variants, cells))
    text = "\n\n".join(tables)
    print(f"\n{text}")
    if options.write:
        write(ROOT / "docs" / "parallelism.md", text)
    for failure in failures:
        print(f"OUT OF TOLERANCE: {failure}", file=sys.stderr)
    return 1 if failures else 0


def table(routing: str, variants: list[str], cells: dict[str, dict[str, Difference | None]]) -> str:
    """Markdown: a row a layout, a column a variant."""
    lines = [f"**{routing}**", "", "| layout | " + " | ".join(variants) + " |", "|---|" + "---|" * len(variants)]
    for layout, row in cells.items():
        lines.append(f"| {layout} | " + " | ".join(shown(row[variant], variant) for variant in variants) + " |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Replace what stands between the marks, aside and renamed."""
    write_between(path, BEGIN, END, text)
