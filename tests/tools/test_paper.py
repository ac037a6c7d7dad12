"""docs/paper.md: figures and tables in order, and its commands; the tables of docs/compare from their data files."""

import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tests.trainings import REPOSITORY
from tools.analyze.command import parse_arguments as analyze
from tools.common.markdown import table
from tools.compare import command as compare
from tools.evaluate.command import parse_arguments as evaluate
from tools.quickstart.command import parse_arguments as quickstart
from tools.report.command import parse_arguments as report
from tools.sweep.arguments import parse_arguments as sweep
from tools.sweep.plan import RIVALS

PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
TABLES = (REPOSITORY / "docs" / "compare" / "tables.md").read_text()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "quickstart.sh": quickstart, "analyze": analyze, "evaluate": evaluate, "report": report, "sweep.sh": sweep,
    "compare": compare.parse_arguments,
}  # fmt: skip


def commands() -> Iterator[list[str]]:
    """Yield the commands of the page in words, with the shell's variables of its block written out."""
    meant = {name: value for name, value in re.findall(r'^([A-Z])="([^"]+)"', PAGE, re.MULTILINE)} | {"N": "1"}
    for text in dict.fromkeys(re.findall(r"`([^`\n]+)`", PAGE)):
        while found := re.search(r"\$([A-Z])\b", text):
            text = text.replace(found[0], meant[found[1]])
        words = [word for word in shlex.split(text) if word != "env" and not re.match(r"[A-Z_]+=", word)]
        program = next((place for place, word in enumerate(words) if word.startswith(("scripts/", "tools/"))), None)
        if program is not None and words[0] in ("bash", "python"):
            yield words[program:]


def test_every_figure_and_table_has_a_row() -> None:
    rows = re.findall(r"^\| (figure|table) (\d+)([a-d]?) \|", PAGE, re.MULTILINE)
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[1]), row[2]))
    for kind, number in (("figure", 12), ("table", 15)):
        assert {int(row[1]) for row in rows if row[0] == kind} == {*range(1, number + 1)}


@pytest.mark.parametrize("words", [*commands()], ids=lambda words: " ".join(words)[:60])
def test_a_command_is_taken(words: list[str]) -> None:
    program = words[0].rpartition("/")[2]
    assert (REPOSITORY / words[0]).exists()
    if program in PARSERS:
        PARSERS[program](words[1:])
    else:
        assert re.fullmatch(r"train_llama_\w+\.sh", program)


# ---------------------------------------------------------------- tables

Rows = Sequence[dict[str, Any]]  # title, title of the reference, and results of the seeds


def interval(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Return the mean and half of its 95 % interval by Student's t."""
    if not values:
        return ""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):{sign}z.{digits}f} ± {half:.{digits}f}"


def above(rows: Rows, row: dict[str, Any], value: Callable[[dict[str, Any]], float]) -> list[float]:
    """Return a row's values minus those of its reference, for the seeds that both have."""
    reference = {of["seed"]: of for each in rows if each["title"] == row["reference"] for of in each["seeds"]}
    return [value(of) - value(reference[of["seed"]]) for of in row["seeds"] if of["seed"] in reference]


def reached(row: dict[str, Any], name: str) -> str:
    """Return the median step at which a row's seeds reached something, and how many did if not all."""
    steps = sorted(of[name] for of in row["seeds"] if name in of)
    part = f" ({len(steps)} of {len(row['seeds'])})" if len(steps) < len(row["seeds"]) else ""
    return f"{statistics.median_low(steps)}{part}" if steps else ""


def losses(rows: Rows) -> str:
    """Return the table of losses."""
    lines = []
    for row in rows:
        columns = {name: [of[name] for of in row["seeds"] if name in of] for name in ("flip_rate", "flip_count")}
        lines.append([
            row["title"], interval([of["loss"] for of in row["seeds"]]),
            interval(above(rows, row, lambda of: of["loss"]), "+"),
            *(reached(row, name) for name in ("first_near", "settled")),
            interval(columns["flip_rate"], digits=4), interval(columns["flip_count"], digits=4), f"{len(row['seeds'])}",
        ])  # fmt: skip
    header = ["", "loss", "above ReMoE", "S first near", "S settled", "flip rate", "flips per token", "seeds"]
    kept = [place for place, name in enumerate(header) if not name or any(line[place] for line in lines)]
    return "\n".join(table([header[place] for place in kept], ([line[place] for place in kept] for line in lines)))


def routers(rows: Rows) -> str:
    """Return the table of the routers' layers."""
    columns, bits = ("experts per token", "tokens without", "for a tenfold frequency", "imbalance"), "domain bits"
    lines = []
    for row in rows:
        for layer in range(len(row["seeds"][0].get("routing", {}).get(bits, ()))):
            found = {name: [of["routing"][name][layer] for of in row["seeds"]] for name in (*columns, bits, "inactive")}
            cells = [interval([value for value in found[name] if value is not None]) for name in columns]
            difference = above(rows, row, lambda of, layer=layer: of["routing"][bits][layer])
            cells += [interval(found[bits], digits=4), interval(difference, "+", digits=4)]
            lines.append([row["title"], str(layer + 1), *cells, ", ".join(map(str, found["inactive"]))])
    return "\n".join(table(["", "layer", *columns, bits, "above ReMoE", "inactive experts"], lines))


OF_GAP = {
    "mixed": [],
    "mixed capped": ["--reference", "remoe-capped", "--arms", "moe"],
    "mixed variable-k": ["--experts", "8", "--arms", *RIVALS, "moe-k2", "remoe-k2"],
    "mixed warm-up 12": ["--lr-warmup-iters", "12"],
    "technical": [],
    "technical capped": ["--reference", "remoe-capped", "--arms", "moe"],
}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs" / "compare").glob("*.json")), ids=lambda path: path.stem)
def test_a_table_is_made_of_what_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _, corpus = path.stem.rpartition("-")
    if place == "gap":
        for name, words in OF_GAP.items():
            if name.split()[0] == corpus:
                assert compare.main(["--corpus", corpus, "--results", str(path), *words]) == 0
                assert between_marks(f"compare gap {name}") == capsys.readouterr().out.strip()
        return
    rows = json.loads(path.read_text())
    assert between_marks(f"compare {place} {corpus}") == losses(rows)
    assert between_marks(f"compare analysis {place} {corpus}") in ("", routers(rows))


def between_marks(words: str) -> str:
    """Return what stands on the page between two comments; "" without them."""
    return TABLES.partition(f"<!-- {words} -->")[2].partition(f"<!-- end of {words} -->")[0].strip()
