"""Test docs/paper.md (rows in order, valid commands) and the tables of docs/compare (made from their data files)."""

import json
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tools.sweeping import final, line, write_run
from tests.trainings import REPOSITORY
from tools.experiments.compare import command as compare
from tools.experiments.quickstart.command import parse_arguments as quickstart
from tools.experiments.sweep.arguments import parse_arguments as sweep
from tools.experiments.sweep.plan import RIVALS
from tools.experiments.sweep.tiny import MODELS
from tools.models.analyze.arguments import parse_arguments as analyze
from tools.models.evaluate.arguments import parse_arguments as evaluate
from tools.report.command import parse_arguments as report

PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
TABLES = (REPOSITORY / "docs" / "compare" / "tables.md").read_text()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "quickstart.sh": quickstart, "analyze": analyze, "evaluate": evaluate, "report": report, "sweep.sh": sweep,
    "compare": compare.parse_arguments,
}  # fmt: skip


def commands() -> Iterator[list[str]]:
    """Yield the page's commands as lists of words, with the page's shell variables expanded."""
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

OF_GAP = {
    "mixed": [],
    "mixed capped": ["--reference", "remoe-capped", "--arms", "moe"],
    "mixed variable-k": ["--experts", "8", "--arms", *RIVALS, "moe-k2", "remoe-k2"],
    "mixed warm-up 12": ["--lr-warmup-iters", "12"],
    **{f"mixed {size}": ["--size", size, "--experts", "8", "--arms", "moe", "dense"] for size in MODELS},
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
    rows, make = json.loads(path.read_text()), runpy.run_path(str(REPOSITORY / "docs" / "tables.py"))
    assert between_marks(f"compare {place} {corpus}") == make["losses"](rows)
    assert between_marks(f"compare analysis {place} {corpus}") == make["routers"](rows)


def test_sweeps_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs of two seeds become a table; runs without a test loss are left out."""
    losses = {"llama_182m_remoe_e8g1": (1.5, 1.6), "llama_182m_moe_e8g1_hash": (1.7, 1.9)}
    for seed in (1, 2):
        for name, values in losses.items():
            lines = line(20), final(20, 2.0), final(20, values[seed - 1], set="test")
            write_run(tmp_path / f"seed-{seed}" / name, 20, *lines, seed=seed)
        write_run(tmp_path / f"seed-{seed}" / "llama_182m_dense_ffn4", 20, line(10), seed=seed)
    make = runpy.run_path(str(REPOSITORY / "docs" / "tables.py"))
    place = make["main"].__globals__["PLACE"] = tmp_path
    (place / "tables.md").write_text("a\n<!-- compare few mixed -->\nold\n<!-- end of compare few mixed -->\nb\n")
    assert make["main"](["few", "mixed", *(str(tmp_path / f"seed-{seed}") for seed in (1, 2))]) == 0
    rows = {row["title"]: row for row in json.loads((place / "few-mixed.json").read_text())}
    assert {title: row["reference"] for title, row in rows.items()} == {"ReMoE": None, "top-k, hash": "ReMoE"}
    assert [(of["seed"], of["loss"]) for of in rows["top-k, hash"]["seeds"]] == [(1, 1.7), (2, 1.9)]
    page = (place / "tables.md").read_text()
    assert re.search(r"\| top-k, hash \| 1\.800 ± \S+ \| \+0\.250 ± \S+ \| inconclusive \| 2 \|", page)
    assert page.startswith("a\n") and page.endswith("\nb\n") and "old" not in page

    # Errors change no file: unknown table, folder without runs, page without marks.
    kept = {path: path.read_text() for path in place.glob("*.*")}
    empty, first = str(tmp_path / "seed-3"), str(tmp_path / "seed-1")
    for words, fact in ((["other"], "other"), (["few", empty], empty), (["other", first], "compare other mixed")):
        with pytest.raises(SystemExit) as error:
            make["main"]([words[0], "mixed", *words[1:]])
        assert error.value.code == 2 and fact in capsys.readouterr().err
    assert {path: path.read_text() for path in place.glob("*.*")} == kept


def between_marks(words: str) -> str:
    """Return the text between two comments in tables.md; "" without them."""
    return TABLES.partition(f"<!-- {words} -->")[2].partition(f"<!-- end of {words} -->")[0].strip()
