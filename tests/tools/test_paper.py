"""Test docs/paper.md (rows in order, valid commands), and published tables against their data files."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
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
PAGE, EXPERIMENTS = ((REPOSITORY / "docs" / f"{name}.md").read_text() for name in ("paper", "experiments"))
TEXT = " ".join(EXPERIMENTS.split())
OTHER_ROUTINGS = "moe-lossfree moe-expert-threshold moe-topp moe-normalized remoe-normalized remoe-deco".split()
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "analyze": analyze, "evaluate": evaluate, "report": report, "sweep": sweep, "compare": compare.parse_arguments,
}  # fmt: skip


def commands() -> Iterator[list[str]]:
    """Yield the page's commands as lists of words, with the page's shell variables expanded."""
    meant = {name: value for name, value in re.findall(r'^([A-Z])="([^"]+)"', PAGE, re.MULTILINE)} | {"N": "1"}
    for text in dict.fromkeys(re.findall(r"`([^`\n]+)`", PAGE)):
        while name := re.search(r"\$([A-Z])\b", text):
            text = text.replace(name[0], meant[name[1]])
        words = [word for word in shlex.split(text) if word != "env" and not re.match(r"[A-Z_]+=", word)]
        if words and words[0] in ("bash", "remoe"):
            yield words[1:]


def test_every_figure_and_table_has_a_row() -> None:
    rows = re.findall(r"^\| (figure|table) (\d+)([a-d]?) \|", PAGE, re.MULTILINE)
    assert rows == sorted(rows, key=lambda row: (row[0], int(row[1]), row[2]))
    for kind, number in (("figure", 12), ("table", 15)):
        assert {int(row[1]) for row in rows if row[0] == kind} == {*range(1, number + 1)}


@pytest.mark.parametrize("words", [*commands()], ids=lambda words: " ".join(words)[:60])
def test_documented_commands_parse(words: list[str]) -> None:
    if words[0] in PARSERS:
        PARSERS[words[0]](words[1:])
    else:
        assert (REPOSITORY / words[0]).exists()


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(DATA.glob("*.json")) if not path.stem.startswith(("gap", "pilot", "quickstart"))],
    ids=lambda path: path.stem,
)
def test_a_table_is_made_of_its_data(path: Path) -> None:
    lines = []
    for row in json.loads(path.read_text()):
        reference = (row["reference"],) if row["reference"] else ()
        lines.append(Line((row["title"],), {entry["seed"]: entry for entry in row["seeds"]}, reference=reference))
    made = "\n".join(markdown([""], lines))
    name = "compare " + " ".join(path.stem.rsplit("-", 1))
    assert f"<!-- {name} -->\n\n{made}\n\n<!-- end of {name} -->" in (DATA / "tables.md").read_text()


@pytest.mark.parametrize(("corpus", "experts", "factors", "shown"), [
    ("mixed", 32, {"moe": 1.0, "remoe-capped": 2.0}, "0.053 ± 0.009"),
    ("technical", 32, {"moe": 1.0, "remoe-capped": 2.0}, "0.023 ± 0.013"),
    ("mixed", 128, {"moe": 2.0, "remoe-capped": 1.0}, "0.079 ± 0.031"),
])  # fmt: skip
def test_gaps_of_byte_models(corpus: str, experts: int, factors: dict[str, float], shown: str) -> None:
    """Gaps are top-k's loss minus bounded ReMoE's, at the FLOPs of ReMoE's 3,600 steps, with tuned learning rates."""
    entries = json.loads((DATA / f"gap-{corpus}.json").read_text()).values()
    topk, bounded = (
        {
            entry["seed"]: point["loss"]
            for entry in entries
            if (entry["experts"], entry["arm"], entry["factor"], entry["warmup"]) == (experts, arm, factor, 300)
            for point in entry["points"]
            if point["equal_to"] == 3600
        }
        for arm, factor in factors.items()
    )
    assert interval([topk[seed] - bounded[seed] for seed in topk if seed in bounded], digits=3) == shown
    assert shown in TEXT


def test_the_pilots_table() -> None:
    results = {(run.size, run.arm): result for run, result in read_results(DATA / "pilot.json") if result}
    for size, row in (("2x64", "64"), ("2x128", "128"), ("2x256", "256"), ("4x256", "256, four layers")):
        topk, hashed, bounded = (results[size, arm] for arm in ("moe", "moe-hash", "remoe-capped"))
        losses = " | ".join(f"{one.loss:.4f}" for one in (topk, hashed, bounded))
        inactive = ", ".join(map(str, bounded.inactive))
        assert f"| {row} | {losses} | {inactive} | {bounded.experts_per_token:.2f} |" in TEXT
    [(_, floor)] = read_results(DATA / "pilot-floor.json")
    assert f"{floor.inactive[0]} and {floor.inactive[1]} experts are inactive, and the loss is {floor.loss:.4f}" in TEXT


@pytest.mark.parametrize("name", sorted(path.parent.name for path in DATA.glob("*/results.json")))
def test_a_table_of_the_protocol(name: str, tmp_path: Path) -> None:
    """The table's command reproduces its page, and its rows in docs/experiments.md."""
    published = DATA / name
    command, *_ = re.findall(r"^`remoe compare ([^`]+)`$", EXPERIMENTS, re.M)
    [flags] = re.findall(rf"^\| {name} \| `([^`]+)`", EXPERIMENTS, re.M)
    words = [*f"{command} {flags}".split(), "--results", f"{published}/results.json", "--output-dir", str(tmp_path)]
    assert compare.main(words) == 0
    assert (tmp_path / "broad" / "results.md").read_text() == (published / "results.md").read_text()
    args = compare.parse_arguments(words)
    results = finished(read_results(published / "results.json"))
    for experts in args.experts:
        lines = compare.make_lines(args, results, experts)
        by_titles, differences = {line.titles: line for line in lines}, gaps(lines)
        verdicts = significance.compare(differences, significance.MARGIN)
        for steps in args.steps:
            columns = ("dense", "moe", "moe-hash", "remoe") if name != "a3" else OTHER_ROUTINGS
            known = [verdicts.get(((str(steps), arm), EQUAL_STEPS)) for arm in columns]
            shown = [f"{each.mean:+.3f}, {each.verdict}".replace("-", "−") if each else "" for each in known]
            cells = " | ".join(shown).replace("equivalent", "equal").replace(" within 0.01", "")
            row = rf"^\| \[{name}\]\(#.*\) \| {experts}\b.* \| {steps:,} \| {re.escape(cells)} \|$"
            assert re.search(row, EXPERIMENTS, re.M)
        for arm in args.arms:
            cells = [ARMS[arm].title]
            for steps in map(str, args.steps):
                seeds = by_titles[steps, arm].seeds.values()
                difference = differences.get(((steps, arm), EQUAL_STEPS), [])
                cells += [interval([each["loss"] for each in seeds], digits=3), interval(difference, "+", digits=3)]
            layers = zip(*(each["inactive"] for each in seeds), strict=True)
            cells.append(f"{fmean(each['experts_per_token'] for each in seeds):.2f}" if arm != "dense" else "")
            cells.append(", ".join(f"{fmean(counts):.0f}" for counts in layers))
            assert f"| {' | '.join(cells)} |" in EXPERIMENTS
            if name in ("a1", "a2", "b1", "b2") and arm in ("dense", "moe", "moe-hash", "remoe"):
                shown = interval(difference, "+", digits=3).replace("-", "−")
                assert shown in (REPOSITORY / "README.md").read_text()
            elif arm == "remoe-normalized":
                lower = interval([-value for value in difference], digits=3)
                assert f"by {lower}](docs/experiments.md#other-routings)" in (REPOSITORY / "README.md").read_text()


def test_when_the_runs_of_table_a2_part() -> None:
    training = json.loads((DATA / "a2" / "training.json").read_text())
    runs = [means for seeds in training.values() for means in seeds.values()]
    before, last = (max(values) - min(values) for values in [*zip(*runs, strict=True)][8::7])
    assert len(runs) == 12
    assert f"within {before:.3f} nats per token of each other; in the last 750 steps, within {last:.3f}" in TEXT


def test_what_the_runs_of_table_a2_copy() -> None:
    data = json.loads((DATA / "a2" / "repeats.json").read_text())
    arms, share = ["moe", "remoe", "remoe-capped", "moe-hash"], data["repeats"] / data["tokens"]
    cells: list[numpy.ndarray] = []
    for step in ("2880", "9600"):
        loss, repeats = numpy.moveaxis([[*data[step][arm].values()] for arm in arms], -1, 0)  # [arm, seed]
        others = (loss - share * repeats) / (1 - share)
        cells += [repeats.mean(axis=1), others.mean(axis=1)]
    for arm, values in zip(arms, numpy.array(cells)[[0, 2, 1, 3]].T, strict=True):
        assert f"| {ARMS[arm].title} | {' | '.join(f'{value:.3f}' for value in values)} |" in TEXT
    correlation = numpy.corrcoef(loss.flatten(), repeats.flatten())[0, 1]
    assert f"{100 * share:.0f} % of the held-out" in TEXT and f"(r = {correlation:.2f})" in TEXT
    assert (others.argmin(axis=0) == arms.index("moe-hash")).all()
    for arm in ("moe", "moe-hash"):
        whole, *parts = ((each[arms.index(arm)] - each[2]) for each in (loss, share * repeats, (1 - share) * others))
        texts = [f"{whole.mean():+.3f}", *(interval([*part], "+", digits=3) for part in parts)]
        assert all(text.replace("-", "−") in TEXT for text in texts), texts


def test_the_quickstarts_seeds() -> None:
    losses = json.loads((DATA / "quickstart-subwords.json").read_text())
    cells = " | ".join(interval([one[model] for one in losses], digits=3) for model in ("dense", "moe", "remoe"))
    gap = interval([one["moe"] - one["remoe"] for one in losses], digits=3)
    above, late = (max(one[name] for one in losses) for name in ("sparsity_above_target", "late_distance_from_target"))
    assert f"by at most {above:.3f}; in the second half it is within {late:.3f} of it" in PAGE
    pages = ("README.md", "docs/experiments.md")
    readme, page = (" ".join((REPOSITORY / name).read_text().split()) for name in pages)
    assert f"| {cells} |" in readme and f"ReMoE ends {gap} below top-k" in readme and f"is {gap} above ReMoE" in page
