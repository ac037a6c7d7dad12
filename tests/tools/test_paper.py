"""docs/paper.md: every figure and table in its order, and its commands, run with a few steps as they stand there."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console

from tests.entry import shared_entry
from tests.trainings import REPOSITORY
from tools.analyze.command import parse_arguments as analyze
from tools.common.flags import words_of
from tools.compare import command as compare
from tools.compare.recipes import SETTINGS, TUNED, recipe_of
from tools.compare.router_figures import markdown as routers
from tools.compare.saved_results import SavedResults
from tools.compare.table import markdown
from tools.compare.trainings import Processes
from tools.evaluate.command import parse_arguments as evaluate
from tools.quickstart.command import parse_arguments as quickstart
from tools.report.command import parse_arguments as report
from tools.sweep import command as sweep
from tools.sweep import execution, plan, settings
from tools.sweep.progress import SweepDisplay, Work
from tools.sweep.run_log import log_of

PAGE = (REPOSITORY / "docs" / "paper.md").read_text()
TABLES = (REPOSITORY / "docs" / "compare" / "tables.md").read_text()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "quickstart.sh": quickstart, "analyze": analyze, "evaluate": evaluate, "report": report,
    "sweep.sh": sweep.parse_arguments,
}  # fmt: skip
SHORT = "--train-iters 3 --tuning-iters 2 --seeds 1 --corpora mixed --processes 1".split()
SMALL = "--eval-iters 1 --seq-length 32 --max-position-embeddings 32".split()


def commands() -> list[list[str]]:
    """Of the page, in words, with its abbreviations written out."""
    meant = dict(re.findall(r"`([A-Z])`[^`]* for `([^`]+)`", PAGE))
    written = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    written += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    found = []
    for text in written:
        text = re.sub(r"\b[A-Z]\b(?!=)", lambda match: meant.get(match[0], match[0]), text.partition("#")[0].strip())
        words = [word for word in shlex.split(text) if not re.match(r"[A-Z_]+=", word)]
        program = next((place for place, word in enumerate(words) if word.startswith(("scripts/", "tools/"))), None)
        if program is not None and words[0] in ("bash", "python"):
            found.append(words[program:])
    return [[*words] for words in dict.fromkeys(map(tuple, found))]


COMPARISONS = [words[1:] for words in commands() if words[0] == "tools/compare"]


def test_every_figure_and_table_has_a_row() -> None:
    figures, tables = (PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0] for name in ("Figures", "Tables"))
    for part, number in ((figures, 12), (tables, 15)):
        rows = [int(row) for row in re.findall(r"^\| (\d+)[a-d]? \|", part, re.MULTILINE)]
        assert list(dict.fromkeys(rows)) == [*range(1, number + 1)] and rows == sorted(rows)


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_a_command_is_taken(words: list[str]) -> None:
    program, arguments = words[0].rpartition("/")[2], words[1:]
    assert (REPOSITORY / words[0]).exists()
    if program == "compare":
        assert compare.parse_arguments(arguments).rows
    elif program in PARSERS:
        PARSERS[program](arguments)
    else:
        assert re.fullmatch(r"train_llama_\w+\.sh|gpu_acceptance\.sh", program)


def test_comparisons_train_what_the_sweeps_of_the_page_do() -> None:
    trained = {row for words in COMPARISONS for row in compare.parse_arguments(words).rows}
    tuned = trained & TUNED.keys()
    kinds = {recipe_of(row).run.kind for row in trained - tuned}.union(*(TUNED[row] for row in tuned))
    axes = {recipe_of(row).run.axis for row in trained - tuned} | {*SETTINGS}
    sweeps = [sweep.parse_arguments(words[1:]) for words in commands() if words[0] == "scripts/sweep.sh"]
    assert sweeps and all({run.kind for run in sweep.planned(args)} <= kinds for args in sweeps if not args.stages)
    assert {run.axis for args in sweeps for run in sweep.planned(args)} <= axes


def train(launch: plan.Launch, run: plan.Run, display: SweepDisplay, work: Work, _: IO[str]) -> str | None:
    """In the place of `execution.train`: what the launch script would start, in a Megatron that is imported already."""
    display.begin(work)
    words = words_of(settings.would_start_with(launch, run, anywhere=False))
    folder = launch.folder(run)
    folder.mkdir(parents=True)
    (folder / "command.sh").write_text(shlex.join([settings.ENTRY, *words]))
    code, printed = shared_entry().run(words, limit=120)
    log_of(folder).write_text(printed)
    return None if code == 0 else printed[-3000:]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For all commands, which share runs as on the page."""
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(autouse=True)
def without_new_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sweeps in this process, trainings and analyses in forks: imports would take most of the time."""

    def run(_: Processes, words: list[str], given: dict[str, str], where: str) -> None:
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        if words[0] == "bash":
            assert sweep.sweep(Console(quiet=True), sweep.parse_arguments(words[2:])) == 0, where
        else:
            code, printed = shared_entry().run(words[2:], script=Path(words[1]) / "__main__.py", limit=120)
            assert code == 0, printed

    monkeypatch.setattr(Processes, "_run", run)
    monkeypatch.setattr(execution, "train", train)
    yield


@pytest.mark.slow
@pytest.mark.parametrize("words", COMPARISONS, ids=" ".join)
def test_a_comparison_is_made(words: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = words.index("--") if "--" in words else len(words)
    has_flips = "--moe-log-flips-interval" in words
    flags = [*words[place + 1 :], *SMALL, *(["--moe-log-flips-interval", "2"] if has_flips else [])]
    folder = output / ("flips" if has_flips else "plain")
    arguments = [*words[:place], *SHORT, "--output-dir", str(folder), "--", *flags]
    args = compare.parse_arguments(arguments)
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "mixed.json").read_text())
    for row in args.rows:
        (result,) = found["results"][row].values()
        assert 2 < result["loss"] < 7  # matched runs take more steps
        assert "dense" in row or has_flips == (result["flip_rate"] is not None)
    assert printed.count("\n| ") >= len(args.rows) + 1


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs" / "compare").glob("*.json")), ids=lambda path: path.stem)
def test_a_table_is_made_of_what_is_kept(path: Path) -> None:
    kept = SavedResults.read(path, json.loads(path.read_text())["inputs"])
    place, _, corpus = path.stem.rpartition("-")
    assert between_marks(f"compare {place} {corpus}") == markdown(kept.results, kept.tuned)
    found = between_marks(f"compare analysis {place} {corpus}")
    assert found in ("", routers(kept.results))


def between_marks(words: str) -> str:
    """Return what stands on the page between two comments; "" without them."""
    return TABLES.partition(f"<!-- {words} -->")[2].partition(f"<!-- end of {words} -->")[0].strip()
