"""Make the tables of docs/compare from sweeps: python docs/tables.py NAME CORPUS [FOLDER ...]

Each FOLDER is the --output-dir of a sweep with another seed. The figures of its finished runs are kept in
docs/compare/NAME-CORPUS.json, with those of remoe analyze where a run's folder has them. The tables are made of this
file, printed, and written between its marks in tables.md.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron.remoe.files.files import write_text  # noqa: E402
from tools.console.markdown import table  # noqa: E402
from tools.experiments.compare.significance import MARGIN, compare, half_width  # noqa: E402
from tools.experiments.sweep.plan import AXES, BASE_SIZE, FEW_EXPERTS, PROTOCOLS, WHOLE, Run  # noqa: E402
from tools.experiments.sweep.results import rows_of  # noqa: E402
from tools.experiments.sweep.tiny import MODELS  # noqa: E402
from tools.runs.figure_reader import read_figures  # noqa: E402
from tools.text.corpora.dataset import CORPORA  # noqa: E402

PLACE = ROOT / "docs" / "compare"
KINDS = {"dense": "dense", "moe": "top-k, softmax", "remoe": "ReMoE"}
COLUMNS = "experts per token", "tokens without", "for a tenfold frequency", "imbalance"
BITS = "domain bits per token"
NAMES = *COLUMNS, BITS, "inactive"
KEPT = "iterations", "flops", "first_near", "settled", "flip_rate", "flip_count"

Rows = Sequence[dict[str, Any]]  # title, title of the reference, and results of the seeds


def title_of(run: Run) -> str:
    """Return a run's title: its routing, and settings that differ from the figures' base."""
    model, protocol = MODELS[run.size], PROTOCOLS.get(run.kind)
    words = [KINDS[run.kind] if protocol is None else f"{KINDS[run.routing].split(',')[0]}, {protocol.title}"]
    words += [f"{model.layers} layers of {model.hidden}"] if run.size != BASE_SIZE else []
    words += [f"E = {run.experts}"] if run.experts not in (None, FEW_EXPERTS) else []
    words += [f"G = {run.granularity}"] if run.granularity not in (None, WHOLE) else []
    words += [f"{AXES[run.axis].label} = {run.value:g}"] if run.axis else []
    return ", ".join(words) + (f" × {run.expansion}" if run.expansion > 1 else "")


def collect(folders: Sequence[Path]) -> Rows:
    """Return a row for each run with a test loss, in nats per token. If folders share a seed, the last one counts."""
    found: dict[Run, dict[int, dict[str, Any]]] = {}
    for folder in folders:
        for run, outcome in rows_of(folder, ()):
            if outcome is None or outcome.test_loss is None:
                continue
            seed = read_figures(folder / run.name).whole("seed")
            of: dict[str, Any] = {"seed": seed, "loss": outcome.test_loss}
            of |= {name: getattr(outcome, name) for name in KEPT}
            of["routing"] = routing_of(folder / run.name / "analysis")
            found.setdefault(run, {})[seed] = {name: value for name, value in of.items() if value is not None}
    rows = []
    for run, seeds in found.items():
        title = title_of(run)
        reference = title_of(Run(run.size, "remoe", run.experts or FEW_EXPERTS, run.granularity or WHOLE))
        rows.append(
            {"title": title, "reference": reference if title != reference else None, "seeds": [*seeds.values()]}
        )
    return rows


def routing_of(folder: Path) -> dict[str, list[Any]] | None:
    """Return the figures of an analysis by layer; None if there is none."""
    if not (folder / "load.json").exists():
        return None
    tokens, balance, load = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("experts_per_token", "balance", "load")
    )
    layers, slopes = tokens["layers"], tokens["by_frequency"].get("slopes", {})
    columns = [
        [of["mean"] for of in layers.values()], [of["none"] for of in layers.values()],
        [slopes[layer]["slope"] if slopes else None for layer in layers],
        [of["imbalance"] for of in balance["layers"].values()],
    ]  # fmt: skip
    found = dict(zip(COLUMNS, columns, strict=True))
    found["inactive"] = [len(of["inactive"]) for of in balance["layers"].values()]
    return found | {BITS: [of["bits_per_token"] for of in (load["specialization"] or {}).values()]}


def interval(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Return the mean and half of its 95 % interval; "" without values."""
    if not values:
        return ""
    half = f" ± {half_width(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}z.{digits}f}{half}"


def above(rows: Rows, row: dict[str, Any], *keys: Any) -> list[float]:
    """Return a row's figure behind `keys` minus that of its reference, for the seeds in which both have it."""
    reference = {of["seed"]: of for each in rows if each["title"] == row["reference"] for of in each["seeds"]}
    pairs = [(of, reference.get(of["seed"], {})) for of in row["seeds"]]
    found = [[reduce(getitem, keys, of) for of in pair] for pair in pairs if all(keys[0] in of for of in pair)]
    return [own - other for own, other in found]


def reached(row: dict[str, Any], name: str) -> str:
    """Return the median step at which a row's seeds reached something, and how many did if not all."""
    steps = sorted(of[name] for of in row["seeds"] if name in of)
    part = f" ({len(steps)} of {len(row['seeds'])})" if len(steps) < len(row["seeds"]) else ""
    return f"{statistics.median_low(steps)}{part}" if steps else ""


def losses(rows: Rows) -> str:
    """Return the table of losses, in nats per token; its verdicts are corrected for all its comparisons."""
    gaps = {row["title"]: above(rows, row, "loss") for row in rows}
    verdicts = compare({title: values for title, values in gaps.items() if values}, MARGIN)
    lines = []
    for row in rows:
        columns = {
            name: [of[name] for of in row["seeds"] if name in of] for name in ("flops", "flip_rate", "flip_count")
        }
        title = row["title"]
        lines.append([
            title, interval([of["loss"] for of in row["seeds"]]), interval(gaps[title], "+"),
            verdicts[title].verdict if title in verdicts else "",
            f"{statistics.fmean(columns['flops']):.4g}" if columns["flops"] else "",
            *(reached(row, name) for name in ("first_near", "settled")),
            interval(columns["flip_rate"], digits=4), interval(columns["flip_count"], digits=4), f"{len(row['seeds'])}",
        ])  # fmt: skip
    header = "|loss|above ReMoE|verdict|FLOPs|S first near|S settled|flip rate|flips per token|seeds".split("|")
    return _table(header, lines)


def routers(rows: Rows) -> str:
    """Return the table of the routers' layers; "" if nothing was analyzed."""
    lines = []
    for row in rows:
        analyzed = [of for of in row["seeds"] if "routing" in of]
        for layer in range(len(analyzed[0]["routing"]["inactive"]) if analyzed else 0):
            found = {
                name: [of[layer] for each in analyzed for of in [each["routing"].get(name)] if of] for name in NAMES
            }
            cells = [interval([value for value in found[name] if value is not None]) for name in COLUMNS]
            difference = above(rows, row, "routing", BITS, layer) if found[BITS] else []
            cells += [interval(found[BITS], digits=4), interval(difference, "+", digits=4)]
            lines.append([row["title"], str(layer + 1), *cells, ", ".join(map(str, found["inactive"]))])
    return _table(["", "layer", *COLUMNS, BITS, "above ReMoE", "inactive experts"], lines) if lines else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns that have a title and no values."""
    kept = [place for place, name in enumerate(header) if not name or any(line[place] for line in lines)]
    return "\n".join(table([header[place] for place in kept], ([line[place] for place in kept] for line in lines)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Keep the figures, and renew and print the tables; write nothing if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("corpus", metavar="CORPUS", choices=CORPORA, help=" or ".join(CORPORA))
    parser.add_argument("folders", metavar="FOLDER", nargs="*", type=Path)
    args = parser.parse_args(arguments)
    path, page = PLACE / f"{args.name}-{args.corpus}.json", PLACE / "tables.md"
    if not args.folders and not path.exists():
        parser.error(f"NAME {args.name}: there is no {path}. Name the folders of its sweeps.")
    rows, text = collect(args.folders) if args.folders else json.loads(path.read_text()), page.read_text()
    if not rows:
        parser.error(f"FOLDER {' '.join(map(str, args.folders))}: no run has a test loss. Give --split a third part.")
    for kind, made in (("", losses(rows)), ("analysis ", routers(rows))):
        mark = f"compare {kind}{args.name} {args.corpus}"
        print(made)
        before, start, rest = text.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition(f"\n<!-- end of {mark} -->")
        if bool(made) != bool(end):
            parser.error(f"{page}: needs the marks of '{mark}' if there is such a table, and else none.")
        text = f"{before}{start}\n{made}\n{end}{after}" if made else text
    if args.folders:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    write_text(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
