"""Test that layouts of up to four processes train like one process: loss, router gradients, counts and λ.

By default, a few layouts run. To run all layouts in all variants, and write the table of docs/parallelism.md:

    pytest tests/parity --parity-tables runs/parity      finished training runs in that folder are not repeated
"""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.remoe.files.files import write_text
from tests.data_sets import real_text, write_documents
from tests.parity.layouts import DENSE_AND_MOE, FEW_EXPERTS, LAYOUTS, NORMALIZED, SINGLE, VARIANTS
from tests.parity.measure import Case, Difference, Training, compare, train
from tests.training_runs import run
from tools.console import markdown
from tools.console.places import ROOT

CORE = [
    Case("gpt", "ReMoE", "plain", "DP2, distributed optimizer, overlap"),
    Case("gpt", "ReMoE", "plain", "TP2 + SP"),
    Case("gpt", "ReMoE", "plain", "EP2, alltoall"),
    Case("gpt", "ReMoE", "plain", "EP2, allgather"),
    Case("gpt", "ReMoE", "plain", "TP2 x EP2, expert TP 2"),
    Case("gpt", "ReMoE", DENSE_AND_MOE, "PP2 x EP2"),
    Case("gpt", FEW_EXPERTS, DENSE_AND_MOE, "PP2, 2 virtual stages"),
    Case("gpt", NORMALIZED, DENSE_AND_MOE, "PP2 x EP2"),
    Case("gpt", NORMALIZED, "plain", "TP2 + SP"),
    # HybridModel in a layout against GPTModel in one process.
    Case("hybrid", "ReMoE", DENSE_AND_MOE, "PP2, 2 virtual stages"),
]
# Model class, routing, and the title of its row; ReMoE in GPTModel has a row for each layout.
CHECKED = {
    ("gpt", "ReMoE"): "",
    ("gpt", FEW_EXPERTS): "at most 2 experts, largest",
    ("gpt", NORMALIZED): "normalized, a λ per layer, largest",
    ("gpt", "top-k"): "top-k, largest",
    ("hybrid", "ReMoE"): "HybridModel, largest",
}
ALL = [Case(*kind, variant, layout) for kind in CHECKED for variant in VARIANTS for layout in LAYOUTS]
ALL = [case for case in ALL if case.model != "gpt" or case.layout != SINGLE]
# Column of the table → the variants whose largest differences it shows.
COLUMNS = {"plain, full or MoE recompute": ["plain", "full recompute", "MoE recompute"]}
COLUMNS |= {variant: [variant] for variant in VARIANTS if "recompute" not in variant and variant != "plain"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", ALL if metafunc.config.getoption("--parity-tables") else CORE, ids=str)


class Runs:
    """The training runs of this test session; runs with the same routing and variant start from one checkpoint."""

    def __init__(self, data: Path, folder: Path, steps: int) -> None:
        self.data, self.folder, self.steps = data, folder, steps
        self.differences: dict[Case, Difference] = {}

    def start(self, case: Case) -> Path:
        """Return the checkpoint that the case starts from, in its model class."""
        folder = self.folder / case.routing / case.variant / "initial"
        begin = ["--train-iters", "1", "--save", str(folder / "checkpoint"), "--save-interval", "1"]
        train(folder, self.data, replace(case, model="gpt", layout=SINGLE), *begin)
        if case.model == "gpt":
            return folder / "checkpoint"
        if not (converted := folder / "hybrid").exists():
            places = ["--load", str(folder / "checkpoint"), "--save", str(converted)]
            run(["convert", "--model", "hybrid", *places], script=ROOT / "tools" / "__main__.py")
        return converted

    def train(self, case: Case, *flags: str) -> Training:
        """Train a case for `steps` steps, or read its figures if that is done already."""
        place = self.folder / case.routing / case.variant / " ".join([case.model, case.layout, *flags])
        load = ["--train-iters", str(self.steps), "--load", str(self.start(case)), "--finetune"]
        return train(place, self.data, case, *load, *flags)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    kept: Path | None = request.config.getoption("--parity-tables")
    if kept is None:
        return Runs(request.getfixturevalue("data"), tmp_path_factory.mktemp("parity"), steps=4)
    kept = kept.resolve()
    if not (kept / "data.idx").exists():
        kept.mkdir(parents=True, exist_ok=True)
        write_documents(kept / "data", real_text())
    return Runs(kept / "data", kept, steps=20)


def test_same_training(case: Case, runs: Runs) -> None:
    expected = runs.train(replace(case, model="gpt", layout=SINGLE))
    actual = runs.train(case)
    assert bool(actual.sparsities) == (case.routing != "top-k")
    difference = runs.differences[case] = compare(actual, expected)
    assert difference.is_tolerable(case.variant), difference


def row(title: str, differences: dict[Case, Difference]) -> list[str]:
    """Return the largest differences of loss and gradient per column, with a mark if a case is out of tolerance."""
    cells = [title]
    for variants in COLUMNS.values():
        column = {case: one for case, one in differences.items() if case.variant in variants}
        mark = "" if all(one.is_tolerable(case.variant) for case, one in column.items()) else " **!**"
        loss, gradient = (max(getattr(one, name) for one in column.values()) for name in ("loss", "gradient"))
        cells.append(f"{loss:.0e} / {gradient:.0e}{mark}")
    return cells


def test_table(runs: Runs, request: pytest.FixtureRequest) -> None:
    """Write a row for each layout of ReMoE, and the largest differences of the other kinds."""
    if request.config.getoption("--parity-tables") is None:
        pytest.skip("needs --parity-tables FOLDER")
    differences = runs.differences
    if missing := [case for case in ALL if case not in differences]:
        pytest.skip(f"not written: {len(missing)} cases are missing, the first is {missing[0]}")
    rows: dict[str, dict[Case, Difference]] = {case.layout: {} for case in ALL if case.model == "gpt"}
    for case, one in differences.items():
        rows.setdefault(CHECKED[case.model, case.routing] or case.layout, {})[case] = one
    page, begin, end = ROOT / "docs" / "parallelism.md", "<!-- parity:begin -->\n", "<!-- parity:end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    table = "\n".join(markdown.table(["layout", *COLUMNS], [row(title, cases) for title, cases in rows.items()]))
    write_text(page, f"{before}{begin}{table}\n{end}{rest.partition(end)[2]}")
