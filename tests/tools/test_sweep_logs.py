"""Test what the sweep reads from runs, its tables and its picture."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.tools.sweeping import final, line, sweep, write_run
from tests.trainings import REPOSITORY
from tools.experiments.sweep import plan, run_log, scaling_picture, settings
from tools.experiments.sweep.plan import Run
from tools.recipes import stages
from tools.runs.figure_reader import read_figures


def read(folder: Path) -> run_log.Outcome:
    outcome = run_log.read_outcome(folder)
    assert outcome is not None
    return outcome


@pytest.mark.parametrize(
    ("records", "loss"),
    [
        ([line(20), final(20, 5.0, final=False)], None),  # an evaluation during training
        ([line(10), final(10, 5.0)], None),  # of an earlier, shorter training
        ([line(20), final(20, 5.0, set="test")], None),
        ([line(20), final(20, 5.0, final=False), final(20, 4.5)], 4.5),
    ],
)
def test_only_the_final_validation_loss_finishes_a_run(
    tmp_path: Path, records: list[dict[str, Any]], loss: float | None
) -> None:
    write_run(tmp_path, 20, *records)
    assert read(tmp_path).validation_loss == loss and read(tmp_path).finished == (loss is not None)


def test_figures_of_a_resumed_run(tmp_path: Path) -> None:
    flips = [{"kind": "flips", "iteration": at, "rate": rate, "count": 8 * rate} for at, rate in ((10, 0.3), (20, 0.1))]
    last = line(20, 0.2, sparsity=0.74, target_sparsity=0.75)
    write_run(tmp_path / "run", 25, line(1, 0.9), line(10), line(20), *flips, last, final(25, 4.5))
    found = read(tmp_path / "run")
    assert (found.iterations, found.train_iters, found.tokens) == (25, 25, 25 * 4 * 64)
    assert (found.sparsity, found.target_sparsity, found.settled, found.first_near) == (0.74, 0.75, None, None)
    assert (found.flip_rate, found.flip_count) == (0.1, 0.8), "late in the training"
    assert found.tokens_per_second == pytest.approx(4 * 64 * (10 + 5) / 2)
    assert found.training_seconds == pytest.approx(10 * 0.1 + 10 * 0.2), "the first line's step is one of the first ten"
    assert run_log.read_outcome(tmp_path / "nothing") is None


def test_time_of_a_run_started_twice(tmp_path: Path) -> None:
    """The first step after each start takes 9 s, all others 1 s; the log has no line for steps 61 to 64."""
    sessions = [line(1, 9.0), line(10, 1.8), *(line(at, 1.0) for at in range(20, 61, 10))]
    sessions += [{"kind": "start", "iteration": 64}, line(65, 9.0), line(70, 14 / 6), line(80, 1.0)]
    write_run(tmp_path, 80, *sessions)
    assert read(tmp_path).training_seconds == pytest.approx(2 * 9 + 78)
    [whole] = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
    assert 3600 * whole.hours == pytest.approx(2 * 9 + 78)
    write_run(tmp_path, 80, *sessions[-4:])  # continues a run of another folder
    assert read(tmp_path).training_seconds == pytest.approx(64 * 14 / 6 + 9 + 15)


def test_no_dense_stage_where_s_starts_at_its_target(tmp_path: Path) -> None:
    for first in (0.5, 0.512):
        lines = [line(at, sparsity=s, target_sparsity=0.5) for at, s in ((1, first), (10, 0.51), (20, 0.5), (30, 0.5))]
        write_run(tmp_path, 30, *lines, num_experts=4, moe_router_topk=2)
        found = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
        assert [stage.name for stage in found] == ["way", "steady"] and found[-1].last == 30


def test_stages_of_a_remoe(tmp_path: Path) -> None:
    """Stages match a hand calculation for 8 experts and k = 2; a log line covers the iterations since the last one."""
    path = [0.50, 0.51, 0.53, 0.70, 0.745, 0.76, 0.744, 0.755, 0.75, 0.75]
    lines = [line(5 * place, sparsity=s, target_sparsity=0.75) for place, s in enumerate(path, start=1)]
    write_run(tmp_path, 50, *lines, num_experts=8, moe_router_topk=2)
    assert read(tmp_path).settled == 35
    dense, way, steady = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
    assert (dense.first, dense.last, way.first, way.last, steady.first, steady.last) == (1, 10, 11, 35, 36, 50)
    assert dense.experts == pytest.approx(8 * (0.50 + 0.49) / 2)
    assert way.hours == pytest.approx(25 * 0.1 / 3600)
    assert dense.flops == pytest.approx(4 * 5 * ((100 + 10 * (4 - 2)) + (100 + 10 * (3.92 - 2))))


def test_stages_count_the_running_sums_of_all_steps(tmp_path: Path) -> None:
    """The sums give the pairs of all steps between two lines; the logged S is that of one step."""
    lines = [
        line(at, 1, sparsity=s, target_sparsity=0.75, total_active_pairs=pairs, total_layer_tokens=10 * at)
        for at, pairs, s in ((10, 700, 0.1), (20, 1000, 0.75))
    ]
    write_run(tmp_path, 20, *lines, num_experts=8, moe_router_topk=2)
    dense, way = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
    assert (dense.last, dense.experts, way.experts) == (10, 7.0, 3.0)
    assert dense.flops == 10 * 4 * (100 + 10 * (7 - 2))
    lines = [line(at, 1, total_active_pairs=pairs, total_layer_tokens=10 * at) for at, pairs in ((10, 250), (20, 400))]
    write_run(tmp_path, 20, *lines, num_experts=8, moe_router_topk=2, moe_baseline_router="top_p")
    [whole] = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
    assert whole.experts == 2.0 and whole.flops == 10 * 4 * (100 + 5) + 10 * 4 * (100 - 5)


def test_differences_between_settings() -> None:
    then = settings.parse("--lr 5e-4 --bf16 --save a --data-path 1 a 2 b --lr 1e-3 --cpu".split())
    assert settings.differences(then, settings.parse("--data-path 1 a 2 b --save b --lr=1e-3 --cpu".split())) == ""
    now = settings.parse("--lr 2e-3 --data-path 1 a --seed 1".split())
    assert settings.differences(then, now) == (
        "--cpu was given and is now not given; --data-path was 1 a 2 b and is now 1 a; "
        "--lr was 1e-3 and is now 2e-3; --seed was not given and is now 1"
    )
    then = settings.parse(["--hybrid-layer-pattern", "*E*E"])
    assert settings.differences(then, settings.parse(["--hybrid-layer-pattern", "*E|*E"])) == ""
    assert settings.differences(then, settings.parse(["--hybrid-layer-pattern", "*E*-"]))


def test_results_of_runs_in_a_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "llama_182m_remoe_e4g1", 20, line(20, sparsity=0.5, target_sparsity=0.75), final(20, 4.25))
    write_run(tmp_path / "llama_182m_moe_e4g1", 20, line(8))
    write_run(tmp_path / "llama_182m_moe_e8g1", 10, line(10), final(10, 4.5))
    write_run(tmp_path / "else", 10, line(10), final(10, 4.5))
    output, _ = sweep("--collect", "--output-dir", str(tmp_path))
    assert re.search(r"llama_182m_moe_e4g1 +at 8/20 ", output) and "llama_182m_remoe_e4g1           4.2500" in output
    assert max(map(len, output.split("\n\n")[0].splitlines())) <= 80
    with (tmp_path / "results.csv").open() as file:
        rows = [(row["run"], row["state"], row["validation_loss"], row["tokens"]) for row in csv.DictReader(file)]
    assert rows == [
        ("llama_182m_moe_e4g1", "unfinished", "", "2048"),
        ("llama_182m_remoe_e4g1", "finished", "4.25", "5120"),
        ("llama_182m_moe_e8g1", "finished", "4.5", "2560"),
    ]
    markdown = (tmp_path / "results.md").read_text()
    assert "| llama_182m_remoe_e4g1 | 4.2500 | 0.5000 (0.7500) | 2,560 | 0:02 |" in markdown
    assert "different numbers of tokens (2,560, 5,120)" in markdown
    assert imread(tmp_path / "results.png").size and not list(tmp_path.glob("*.new*"))


def test_picture_has_a_panel_for_each_axis(tmp_path: Path) -> None:
    def width(points: list[tuple[Run, float]]) -> int:
        scaling_picture.draw(tmp_path / "picture.png", points)
        return int(imread(tmp_path / "picture.png").shape[1])

    runs = plan.plan(plan.FIGURES, {}, None)
    all_points = [(run, 2.0 - place / 100) for place, run in enumerate(runs)]
    assert width(all_points) == 1500
    l1_points = [(run, 2.0) for run in plan.plan(["l1-init", "l1-multiplier"], {}, None)]
    compared = [(run, 2.0) for run in plan.plan([plan.COMPARED], {}, None)]
    assert width([*all_points, *l1_points, *compared]) == 2500  # in two rows
    assert width([(run, 2.0) for run in plan.plan(["variable-k"], {}, None)]) == 1000
    for run in (runs[0], Run("182m", "remoe", 8, 1).at("l1-init", 1e-16), Run("182m", "dense", expansion=8)):
        assert width([(run, 2.0)]) == 1000  # a single run gets its own panel


def test_docs_tell_of_every_routing_and_setting() -> None:
    text = (REPOSITORY / "docs" / "baselines.md").read_text()
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)) == {*plan.KINDS, *plan.AXES}
    for name, axis in plan.AXES.items():
        [row] = re.findall(rf"^\| `{name}` \|.*\| (.*) \| `--{name}s` \|$", text, re.MULTILINE)
        [base] = re.findall(r"\*\*(.*)\*\*", row)
        assert [float(value.strip("*")) for value in row.split()] == [*axis.values] and float(base) == axis.base
