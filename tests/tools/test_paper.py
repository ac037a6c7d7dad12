"""docs/paper.md: every figure and table in its order, and commands that the tools take as they stand there."""

import re
import shlex
from collections.abc import Callable

import pytest

from tests.tools import test_sweep_runs
from tests.trainings import REPOSITORY
from tools.analyze.command import parse_arguments as analyze
from tools.compare.command import parse_arguments as compare
from tools.compare.recipes import recipe_of
from tools.evaluate.command import parse_arguments as evaluate
from tools.quickstart.command import parse_arguments as quickstart
from tools.report.command import parse_arguments as report
from tools.sweep import plan
from tools.sweep.command import parse_arguments as sweep
from tools.sweep.command import planned

PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "quickstart.sh": quickstart, "analyze": analyze, "evaluate": evaluate, "report": report,
}  # fmt: skip
# A few steps of each: test_sweep_runs.py, test_sweep_training.py, test_compare.py.
TRAINED = {*(run.kind for run in test_sweep_runs.RUNS), "dense", "moe", "remoe", "moe-warmup", plan.MATCHED}


def commands() -> list[list[str]]:
    """Of the page, in words, with its abbreviations written out."""
    written = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    written += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    found = []
    for text in written:
        text = re.sub(r"^T ", "bash scripts/sweep.sh --tiny ", text.partition("#")[0].strip())
        words = [word for word in shlex.split(text) if not re.match(r"[A-Z_]+=", word)]
        words = words[words[0] in ("bash", "python", ".venv/bin/python") :]
        if len(words) > 1 and words[0].startswith(("scripts/", "tools/")):
            found.append(words)
    return found


def run_of_row(row: str) -> plan.Run:
    return recipe_of(row.removeprefix("tuned-")).run


def test_every_figure_and_table_has_a_row() -> None:
    figures, tables = (PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in ("Figures", "Tables"))
    for part, number in ((figures, 12), (tables, 15)):
        rows = [int(row) for row in re.findall(r"^\| (\d+)[a-d]? \|", part, re.MULTILINE)]
        assert list(dict.fromkeys(rows)) == [*range(1, number + 1)] and rows == sorted(rows)


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_a_command_is_taken_and_was_tried(words: list[str]) -> None:
    program, arguments = words[0].rpartition("/")[2], words[1:]
    assert (REPOSITORY / words[0]).exists()
    if program == "sweep.sh":
        args = sweep(arguments)
        assert args.stages or {run.kind for run in planned(args)} <= TRAINED
    elif program == "compare":
        assert {run.kind for run in map(run_of_row, compare(arguments).rows)} <= TRAINED
    elif program in PARSERS:
        PARSERS[program](arguments)
    else:
        assert re.fullmatch(r"train_llama_\w+\.sh|gpu_acceptance\.sh", program)
