"""Train one small model in every layout and say how far each is from one process (docs/parallelism.md)."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from ..common import markdown
from ..common.data_sets import write_real_text
from ..common.files import write_between
from ..common.places import ROOT
from .layouts import LAYOUTS, MODELS, ROUTINGS, VARIANTS, Layout
from .measure import Difference, TrainingFailed, compare, train

STEPS = 20
# fp32: sums in another order. bf16: every activation is rounded to 8 bits, in other places in each layout.
TOLERANCES = {"bf16": (2e-2, 1e-1)}
TOLERANCE = (1e-4, 1e-4)  # of loss and gradient
# Where the tables of a model class stand.
MARKS = {model: (f"<!-- parity:{model}:begin -->", f"<!-- parity:{model}:end -->") for model in MODELS}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/parity", description=__doc__)
    for name, known in (("layouts", list(LAYOUTS)), ("variants", list(VARIANTS))):
        told = f"{'; '.join(known)} (default: all)"
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar="NAME", help=told)
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="gpt",
        help="Megatron's model class that is split; the one process is GPTModel's in any case (default: gpt)",
    )
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
    layouts = {name: LAYOUTS[name] for name in options.layouts}
    if options.model == "hybrid":
        layouts = {"one process": single} | layouts
    for routing in options.routings:
        cells: dict[str, dict[str, Difference | None]] = {layout: {} for layout in layouts}
        for variant in options.variants:
            initial = folder / slug(routing, variant, "initial")
            begin = ["--train-iters", "1", "--save", str(initial / "checkpoint"), "--save-interval", "1"]
            train(initial, data, single, routing, variant, *begin)
            more = starting_from(initial / "checkpoint")
            expected = train(folder / slug(routing, variant, "one"), data, single, routing, variant, *more)
            if options.model == "hybrid":
                more = starting_from(as_hybrid(initial / "checkpoint"))
            for name, layout in layouts.items():
                place = folder / slug(*([] if options.model == "gpt" else ["hybrid"]), routing, variant, name)
                try:
                    found = train(place, data, layout, routing, variant, *more, model=options.model)
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
        write_between(ROOT / "docs" / "parallelism.md", *MARKS[options.model], text)
    for words in failures:
        print(f"OUT OF TOLERANCE: {words}", file=sys.stderr)
    return 1 if failures else 0


def starting_from(checkpoint: Path) -> list[str]:
    """The flags of a training that is compared."""
    return ["--train-iters", str(STEPS), "--load", str(checkpoint), "--finetune"]


def as_hybrid(checkpoint: Path) -> Path:
    """The same weights for HybridModel."""
    converted = checkpoint.with_name("hybrid")
    if not converted.exists():
        command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint"), "--model", "hybrid"]
        subprocess.run([*command, "--load", str(checkpoint), "--save", str(converted)], check=True)
    return converted


def table(routing: str, variants: list[str], cells: dict[str, dict[str, Difference | None]]) -> str:
    """Markdown: a row a layout, a column a variant."""
    rows = ([layout, *(shown(row[variant], variant) for variant in variants)] for layout, row in cells.items())
    return "\n".join([f"**{routing}**", "", *markdown.table(["layout", *variants], rows)])
