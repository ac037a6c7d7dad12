"""Remake the tables of docs/compare and docs/questions from their data files: python -m tools.experiments.published

Each table stands between two comments with its name, and is written there. The data were made by version 0.1; results
of the present one are shown by `remoe compare --results FILE` and `scripts/sweep.sh --results FILE`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron.remoe.files.files import write_text

from ..console.markdown import table
from ..console.places import ROOT
from .arms import routing_of_arm
from .significance import MARGIN
from .tables import Line, interval, markdown

DOCS = ROOT / "docs"
REFERENCE, CAPPED, SIZE, WARMUP, TUNED = "remoe", "remoe-capped", "182m", 300, 1200
STARTS = (
    "remoe", "moe", "moe-dense-start", "remoe-faster", "remoe-faster-floor", CAPPED, "remoe-faster-capped",
    "remoe-sparse-start", "remoe-small-batches", "moe-expert-threshold",
)  # fmt: skip
PAIRED = ("moe-topp", "moe-threshold", "moe-null", "moe-sequence", "moe-routingfree", "moe-quantile")
# Table of gaps by length, after its corpus → its arms and what differs from the others.
GAPS: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "": (STARTS, {}),
    " capped": ((REFERENCE, "moe", CAPPED), {"reference": CAPPED}),
    " variable-k": ((REFERENCE, *PAIRED, "moe-k2", "remoe-k2"), {}),
    " warm-up 12": (STARTS, {"warmup": 12}),
    **{f" {size}": ((REFERENCE, "moe", "dense"), {"size": size}) for size in ("182m", "469m", "978m")},
}
EVERYWHERE = ("", " capped")  # of every corpus; the others of the first
BITS = "domain bits per token"
COLUMNS = ("experts per token", "tokens without", "for a tenfold frequency", "imbalance")
RANKS = (2, 4, 8)
EXPERTS_OF_A_TOKEN = ((0, 1), (2, 2), (3, 3), (4, 16))  # in both layers


def make_tables() -> dict[str, dict[str, str]]:
    """Return page, below docs/ → name of a table → its text."""
    compare: dict[str, str] = {}
    for path in sorted((DOCS / "compare").glob("*.json")):
        kept, (name, _, corpus) = json.loads(path.read_text(encoding="utf-8")), path.stem.rpartition("-")
        if name == "gap":
            for more in GAPS if corpus == "mixed" else EVERYWHERE:
                compare[f"compare gap {corpus}{more}"] = "\n".join(_gap_tables(kept, *GAPS[more]))
            continue
        lines = [_line(row) for row in kept]
        compare[f"compare {name} {corpus}"] = "\n".join(markdown([""], lines, MARGIN))
        if routers := _router_rows(lines):
            header = ["", "layer", *COLUMNS, BITS, "above ReMoE", "inactive experts"]
            compare[f"compare analysis {name} {corpus}"] = "\n".join(table(header, routers))
    questions = json.loads((DOCS / "questions" / "figures.json").read_text(encoding="utf-8"))
    return {"compare/tables.md": compare, "questions/tables.md": _question_tables(questions)}


def _line(row: Mapping[str, Any]) -> Line:
    reference = (row["reference"],) if row["reference"] else None
    return Line((row["title"],), {entry["seed"]: entry for entry in row["seeds"]}, reference=reference)


def _gap_tables(
    kept: Mapping[str, Any],
    arms: Sequence[str],
    differing: Mapping[str, Any],
) -> Iterator[str]:
    """Yield the lines of the tables of all numbers of experts; each routing has its best learning rate."""
    reference = differing.get("reference", REFERENCE)
    like = (differing.get("size", SIZE), differing.get("warmup", WARMUP))
    entries = [entry for entry in kept.values() if (entry.get("size", SIZE), entry["warmup"]) == like]
    for experts in sorted({entry["experts"] for entry in entries}):
        tuned: dict[str, dict[float, float]] = {}
        lines: dict[tuple[str, str], Line] = {}
        mine = [entry for entry in entries if entry["experts"] == experts]
        for entry in (entry for entry in mine if entry["is_tuning"]):
            for point in (point for point in entry["points"] if point["steps"] == TUNED):
                tuned.setdefault(routing_of_arm(entry["arm"]), {})[entry["factor"]] = point["loss"]
        best = {routing: min(losses, key=losses.__getitem__) for routing, losses in tuned.items()}
        for entry in (entry for entry in mine if not entry["is_tuning"] and entry["arm"] in arms):
            for point in entry["points"] if entry["factor"] == best.get(routing_of_arm(entry["arm"]), 1.0) else ():
                titles = (f"{point['equal_to'] or point['steps']}", entry["arm"])
                other = (titles[0], reference)
                line = lines.setdefault(titles, Line(titles, {}, reference=other if other != titles else None))
                figures = {**point, "train_iters": point["steps"]}
                (line.matched if point["equal_to"] else line.seeds)[entry["seed"]] = figures
        for line in lines.values():
            line.matched = line.seeds if line.titles[1] == REFERENCE else line.matched
        if lines:
            yield from (f"E = {experts}:", "")
            for routing, losses in tuned.items():
                shown = ", ".join(f"{factor:g}: {loss:.4f}" for factor, loss in sorted(losses.items()))
                yield f"- {routing} tuned, loss by factor on the learning rate: {shown}"
            yield ""
            ordered = sorted(lines.values(), key=lambda line: (int(line.titles[0]), arms.index(line.titles[1])))
            yield from (*markdown(["steps", "arm"], ordered, MARGIN), "")


def _router_rows(lines: Sequence[Line]) -> list[list[str]]:
    """Return the rows of the table of the routers' layers."""
    rows = []
    for line in lines:
        analyzed = [entry["routing"] for entry in line.seeds.values() if "routing" in entry]
        for layer in range(len(analyzed[0]["inactive"]) if analyzed else 0):
            columns = {
                name: [entry[name][layer] for entry in analyzed if entry.get(name) and entry[name][layer] is not None]
                for name in (*COLUMNS, BITS, "inactive")
            }
            cells = [interval(columns[name]) for name in (*COLUMNS, BITS)]
            cells.append(interval(_bits_above(line, lines, layer), "+"))
            rows.append([*line.titles, str(layer + 1), *cells, ", ".join(map(str, columns["inactive"]))])
    return rows


def _bits_above(line: Line, lines: Sequence[Line], layer: int) -> list[float]:
    """Return a layer's domain bits per token minus its reference's, for the seeds in which both were analyzed."""
    bits = [
        {
            seed: entry["routing"][BITS][layer]
            for seed, entry in each.seeds.items()
            if entry.get("routing", {}).get(BITS)
        }
        for each in (line, *(other for other in lines if other.titles == line.reference))
    ]
    return [bits[0][seed] - bits[1][seed] for seed in bits[0] if seed in bits[1]] if len(bits) > 1 else []


def _question_tables(trained: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the tables of docs/questions: means and 95 % intervals over seeds."""

    def rows(names: Sequence[str], header: Sequence[str], cells: Any, digits: int = 3) -> str:
        body = []
        for name in names:
            seeds = [cells(name, seed) for seed in trained[name]]
            columns = ([value for value in column if value is not None] for column in zip(*seeds, strict=True))
            body.append([name, *(interval(column, digits=digits) for column in columns)])
        return "\n".join(table(["", *header], body))

    def continued(live: str) -> Any:
        return lambda name, seed: (
            trained[name][seed]["loss"] - trained[live][seed]["loss"],
            *trained[name][seed]["experts"].values(), trained[name][seed]["load"],
        )  # fmt: skip

    header = ["loss − live", "experts, layer 1", "layer 2", "load"]
    names = [name for name in trained if name.startswith(("remoe", "continued", "layer"))]
    tuned = [name for name in trained if name.startswith("tuned")]
    ranks = [name for name in trained if "ranks" in next(iter(trained[name].values()))]
    caps = ("1", "2", "3", "4")
    experts = []
    for low, high in EXPERTS_OF_A_TOKEN:
        columns: list[list[float]] = [[], [], []]
        for entry in (each["losses"]["experts"] for each in trained["remoe"].values()):
            parts = [each for each in entry if low <= each["experts"] <= high]
            tokens = [each["tokens"] for each in parts]
            columns[0].append(sum(tokens) / sum(each["tokens"] for each in entry))
            for column, key in zip(columns[1:], ("own", "next"), strict=True):
                column += [fmean([each[key] for each in parts], tokens)] if parts else []
        experts.append(
            [f"{low} to {high}" if low < high else f"{low}", *(interval(column, digits=3) for column in columns)]
        )
    correlations = [each["losses"]["correlation"]["all"] for each in trained["remoe"].values()]
    experts.append(
        ["correlation", "", *(interval([entry[key] for entry in correlations], digits=3) for key in ("own", "next"))]
    )
    return {
        "continued": rows(names, header, continued("remoe")),
        "fine-tuned": rows(tuned, header, continued("tuned-live")),
        "caps": rows(
            ["remoe"],
            caps,
            lambda name, seed: [trained[name][seed]["caps"][cap] - trained[name][seed]["caps"]["none"] for cap in caps],
        ),
        "ranks": rows(
            ranks, [*map(str, RANKS)], lambda name, seed: [trained[name][seed]["ranks"][str(n)] for n in RANKS]
        ),
        "experts": "\n".join(
            table(["experts in both layers", "share of tokens", "loss of the token", "of the next"], experts)
        ),
    }


def between_marks(page: str, name: str) -> tuple[str, str, str] | None:
    """Return the text before a table of a page, the table, and the text after it; None without its marks."""
    match = re.fullmatch(rf"(.*<!-- {re.escape(name)} -->\n)(.*)(<!-- end of {re.escape(name)} -->.*)", page, re.DOTALL)
    return (match[1], match[2], match[3]) if match else None


def main() -> None:
    """Write all tables into their pages."""
    for page, tables in make_tables().items():
        text = (DOCS / page).read_text(encoding="utf-8")
        for name, made in tables.items():
            if (parts := between_marks(text, name)) is None:
                raise SystemExit(f"docs/{page}: there are no marks of '{name}'.")
            text = f"{parts[0]}\n{made.strip()}\n\n{parts[2]}"
        write_text(DOCS / page, text)


if __name__ == "__main__":
    main()
