"""Test the published tables against their data, and docs/paper.md: its rows are in order, and its commands parse."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean

import numpy
import pytest

from tests.training_runs import REPOSITORY
from tools.experiments import compare, significance
from tools.experiments.arms import ARMS
from tools.experiments.results import finished, read_results
from tools.experiments.sweep import parse_arguments as sweep
from tools.experiments.tables import EQUAL_STEPS, Line, gaps, interval, markdown
from tools.models.arguments import parse_analyze as analyze
from tools.models.arguments import parse_evaluate as evaluate
from tools.report.command import parse_arguments as report

DATA = REPOSITORY / "docs" / "compare"
README, PAPER, EXPERIMENTS = (
    (REPOSITORY / name).read_text() for name in ("README.md", "docs/paper.md", "docs/experiments.md")
)
BOUNDED, MAIN = "remoe-capped", ("dense", "moe", "moe-hash", "remoe")
OTHERS = "moe-lossfree moe-expert-threshold moe-topp moe-normalized remoe-normalized remoe-deco".split()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "analyze": analyze, "evaluate": evaluate, "report": report, "sweep": sweep, "compare": compare.parse_arguments,
}  # fmt: skip


def has_table(page: str, rows: list[list[str]]) -> bool:
    """Return whether a table of the page has these rows and no others."""
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return re.search(rf"[-:]\|\n{re.escape(text)}\n\n", page) is not None


def losses(path: str, arm: str, steps: int) -> dict[int, float]:
    """Return seed → loss."""
    runs = finished(read_results(DATA / path)).items()
    return {run.seed: one.loss for run, one in runs if (run.arm, run.steps, run.is_tuning) == (arm, steps, False)}


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Return the mean and the interval of the differences, for the seeds that both have."""
    return interval([loss - other[seed] for seed, loss in one.items() if seed in other], "+", digits=3)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in DATA.glob("*/results.json")))
def test_protocol(name: str, tmp_path: Path) -> None:
    """The command of a table makes its page, its rows in the tables of results, and the table of its section."""
    [command, *_] = re.findall(r"^`remoe compare ([^`]+)`$", EXPERIMENTS, re.M)
    [flags] = re.findall(rf"^\| {name} \| `([^`]+)`", EXPERIMENTS, re.M)
    data = DATA / name / "results.json"
    words = [*f"{command} {flags}".split(), "--results", str(data), "--output-dir", str(tmp_path)]
    assert compare.main(words) == 0
    assert (tmp_path / "broad" / "results.md").read_text() == data.with_suffix(".md").read_text()
    args = compare.parse_arguments(words)
    [experts] = args.experts
    lines = compare.make_lines(args, finished(read_results(data)), experts)
    by_titles, differences = {line.titles: line.seeds.values() for line in lines}, gaps(lines)
    verdicts = significance.compare(differences, significance.MARGIN)
    expected = []
    for steps in args.steps:
        known = [verdicts.get(((str(steps), arm), EQUAL_STEPS)) for arm in (OTHERS if name == "a3" else MAIN)]
        cells = " | ".join(f"{each.mean:+.3f}, {each.verdict}" if each else "" for each in known).replace("-", "−")
        expected.append((str(experts), f"{steps:,}", cells.replace("equivalent", "equal").replace(" within 0.01", "")))
    assert re.findall(rf"^\| \[{name}\]\(#.*?\) \| (\d+).*? \| ([\d,]+) \| (.*) \|$", EXPERIMENTS, re.M) == expected
    rows = []
    for arm in args.arms:
        rows.append([ARMS[arm].title])
        for titles in ((str(steps), arm) for steps in args.steps):
            seeds, gap = by_titles[titles], differences.get((titles, EQUAL_STEPS), [])
            rows[-1] += [interval([each["loss"] for each in seeds], digits=3), interval(gap, "+", digits=3)]
        layers = zip(*(each["inactive"] for each in seeds), strict=True)
        rows[-1].append("" if arm == "dense" else f"{fmean(each['experts_per_token'] for each in seeds):.2f}")
        rows[-1].append(", ".join(f"{fmean(counts):.0f}" for counts in layers))
    assert has_table(EXPERIMENTS, rows)


def test_readme() -> None:
    expected = []
    for name, experts, steps in (("b1", "8", 3600), ("a1", "32", 3600), ("b2", "128", 3600), ("a2", "32", 12000)):
        data = {arm: losses(f"{name}/results.json", arm, steps) for arm in (*MAIN, BOUNDED)}
        data["dense"] = data["dense"] or losses("a1/results.json", "dense", steps)  # it has no experts
        cells = [difference(data[arm], data[BOUNDED]).replace("-", "−") or "not run" for arm in MAIN]
        expected.append((experts, f"{steps:,}", *cells))
    row = r"^\| \[(\d+)\]\(docs/experiments.*?\) \| ([\d,]+)" + r" \| ([^|]+)" * len(MAIN) + r" \|$"
    assert re.findall(row, README, re.M) == expected
    runs = json.loads((DATA / "quickstart-subwords.json").read_text())
    cells = [interval([run[arm] for run in runs], digits=3) for arm in ("dense", "moe", "remoe")]
    assert f"| six seeds, mean ± 95 % interval | {' | '.join(cells)} |" in README


def test_equal_flops_of_table_a3() -> None:
    rows = []
    for arm in ("remoe-normalized", "remoe-deco"):
        path, cells = f"a3/equal-flops-{arm.removeprefix('remoe-')}.json", []
        results = finished(read_results(DATA / path))
        for steps in (1200, 3600):
            near = {run.seed: (run.steps, one.loss) for run, one in results.items() if steps < run.steps < 2 * steps}
            bounded, lengths = {seed: loss for seed, (_, loss) in near.items()}, [length for length, _ in near.values()]
            cells.append(difference(losses("a3/results.json", arm, steps), bounded))
            cells.append(f"{min(lengths):,} to {max(lengths):,}")
        rows.append([ARMS[arm].title, *cells, f"[runs](compare/{path})"])
    assert has_table(EXPERIMENTS, rows)


def test_repeats_of_table_a2() -> None:
    data = json.loads((DATA / "a2" / "repeats.json").read_text())
    rows, share = [], data["repeats"] / data["tokens"]
    for arm in ("moe", "remoe", BOUNDED, "moe-hash"):
        means = [numpy.mean([*data[step][arm].values()], axis=0) for step in ("2880", "9600")]
        others = [(loss - share * repeats) / (1 - share) for loss, repeats in means]
        rows.append([ARMS[arm].title, *(f"{value:.3f}" for value in (*(repeats for _, repeats in means), *others))])
    assert has_table(EXPERIMENTS, rows)


def test_pilot() -> None:
    results, rows = {(run.size, run.arm): one for run, one in read_results(DATA / "pilot.json") if one}, []
    for size, title in (("2x64", "64"), ("2x128", "128"), ("2x256", "256"), ("4x256", "256, four layers")):
        arms = [results[size, arm] for arm in ("moe", "moe-hash", BOUNDED)]
        inactive = ", ".join(map(str, arms[-1].inactive))
        rows.append([title, *(f"{one.loss:.4f}" for one in arms), inactive, f"{arms[-1].experts_per_token:.2f}"])
    assert has_table(EXPERIMENTS, rows)


OLDER = [path for path in DATA.glob("*-*.json") if not path.stem.startswith(("gap", "pilot", "quickstart"))]


@pytest.mark.parametrize("path", sorted(OLDER), ids=lambda path: path.stem)
def test_tables_of_version_0_1(path: Path) -> None:
    lines = [
        Line((row["title"],), {one["seed"]: one for one in row["seeds"]}, reference=(row["reference"] or "",))
        for row in json.loads(path.read_text())
    ]
    made, name = "\n".join(markdown([""], lines)), "compare " + " ".join(path.stem.rsplit("-", 1))
    assert f"<!-- {name} -->\n\n{made}\n\n<!-- end of {name} -->" in (DATA / "tables.md").read_text()


def test_every_figure_and_table_of_the_paper_has_a_row() -> None:
    rows = re.findall(r"^\| (figure|table) (\d+)([a-d]?) \|", PAPER, re.M)
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[1]), row[2]))
    for kind, number in (("figure", 12), ("table", 15)):
        assert {int(row[1]) for row in rows if row[0] == kind} == {*range(1, number + 1)}


def commands() -> Iterator[list[str]]:
    """Yield the page's commands as lists of words, with the page's shell variables expanded."""
    meant = {name: value for name, value in re.findall(r'^([A-Z])="([^"]+)"', PAPER, re.M)} | {"N": "1"}
    for text in dict.fromkeys(re.findall(r"`([^`\n]+)`", PAPER)):
        while name := re.search(r"\$([A-Z])\b", text):
            text = text.replace(name[0], meant[name[1]])
        words = [word for word in shlex.split(text) if word != "env" and not re.match(r"[A-Z_]+=", word)]
        if words and words[0] in ("bash", "remoe"):
            yield words[1:]


def test_commands_of_the_paper_parse() -> None:
    for program, *words in commands():
        if program in PARSERS:
            PARSERS[program](words)
        else:
            assert (REPOSITORY / program).exists()
