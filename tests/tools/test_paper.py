"""Test docs/paper.md (rows in order, valid commands), and that published tables are made from their data files."""

import re
import shlex
from collections.abc import Callable, Iterator

import pytest

from tests.trainings import REPOSITORY
from tools.experiments import compare, published
from tools.experiments.quickstart import parse_arguments as quickstart
from tools.experiments.sweep import parse_arguments as sweep
from tools.models.arguments import parse_analyze as analyze
from tools.models.arguments import parse_evaluate as evaluate
from tools.report.command import parse_arguments as report

PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
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


def test_tables_are_made_of_what_is_kept() -> None:
    """`python -m tools.experiments.published` renews the pages."""
    for page, made in published.make_tables().items():
        text = (REPOSITORY / "docs" / page).read_text()
        for name, table in made.items():
            parts = published.between_marks(text, name)
            assert parts is not None and parts[1].strip() == table.strip(), name
