"""Test figures that experiments read from runs, runs of equal FLOPs, stages, and tables against hand calculations."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tests.tools.sweeping import TEXT, final, finish_run, line, sweep, write_run
from tools.experiments import compare, results, tables
from tools.experiments.results import Result, read_result
from tools.experiments.run import Run
from tools.experiments.run_folders import Grid, make_run_folder, write_json
from tools.experiments.sweep import list_figure_runs, make_panel, parse_arguments
from tools.recipes import flops as stages
from tools.runs.figure_reader import STAMP, read_figures


def read(folder: Path) -> Result:
    result = read_result(folder)
    assert result is not None
    return result


@pytest.mark.parametrize(("records", "loss"), [
    ([line(20), final(20, 5.0, final=False)], None),  # an evaluation during training
    ([line(10), final(10, 5.0)], None),  # left by an earlier, shorter run
    ([line(20), final(20, 5.0, set="test")], None),
    ([line(20), final(20, 5.0, final=False), final(20, 4.5)], 4.5),
])  # fmt: skip
def test_only_the_final_validation_loss_finishes_a_run(tmp_path, records, loss: float | None) -> None:
    write_run(tmp_path, 20, *records)
    assert read(tmp_path).loss == loss and read_result(tmp_path / "nothing") is None


def test_losses_of_several_sets_are_weighted_and_per_byte(tmp_path: Path) -> None:
    """The sets have 100 tokens of 4 bytes and 300 tokens of 2 bytes. There is no loss until all sets have one."""
    sets, per_byte = [final(20, 2.0, set="code", tokens=100), final(20, 1.0, set="docs", tokens=300)], {"code": 0.25}
    write_run(tmp_path, 20, line(20), *sets[:1], validation_set_names=["code", "docs"])
    assert read(tmp_path).loss is None
    write_run(tmp_path, 20, line(20), *sets, validation_set_names=["code", "docs"])
    assert read(tmp_path).loss == pytest.approx((2.0 * 100 + 1.0 * 300) / 400)
    (tmp_path / STAMP).write_text(json.dumps({"per_byte": per_byte | {"docs": 0.5}}))
    result = read(tmp_path)
    assert result.losses == {"code": 0.5, "docs": 0.5}
    assert result.loss == pytest.approx((2.0 * 100 + 1.0 * 300) / (400 + 600))


def test_time_of_a_run_started_twice(tmp_path: Path) -> None:
    """The first step after each start takes 9 s, all others 1 s; the log has no line for steps 61 to 64."""
    sessions = [line(1, 9.0), line(10, 1.8), *(line(at, 1.0) for at in range(20, 61, 10))]
    sessions += [{"kind": "start", "iteration": 64}, line(65, 9.0), line(70, 14 / 6), line(80, 1.0)]
    write_run(tmp_path, 80, *sessions)
    assert read(tmp_path).training_seconds == pytest.approx(2 * 9 + 78)
    write_run(tmp_path, 80, *sessions[-4:])  # continues a run of another folder
    assert read(tmp_path).training_seconds == pytest.approx(64 * 14 / 6 + 9 + 15)


def lines(sparsities: dict[int, float], target: float, **more: Any) -> list[dict[str, object]]:
    return [line(at, sparsity=value, target_sparsity=target, **more) for at, value in sparsities.items()]


def counts(pairs: dict[int, int]) -> list[dict[str, object]]:
    return [line(at, total_active_pairs=sum_, total_layer_tokens=10 * at) for at, sum_ in pairs.items()]


# 8 experts with k = 2; the whole path of a ReMoE, by log lines that cover five iterations each
PATH = dict(zip(range(5, 51, 5), (0.5, 0.51, 0.53, 0.7, 0.745, 0.76, 0.744, 0.755, 0.75, 0.75), strict=True))
WARMUP = {"moe_warmup_topk": 6, "moe_warmup_steps": 15}
STAGES: dict[str, tuple[list[dict[str, object]], dict[str, object], list[tuple[str, int, int, float]]]] = {
    "a ReMoE": (lines(PATH, 0.75), {}, [("dense", 1, 10, 3.96), ("way", 11, 25, 8.2 / 3), ("steady", 26, 50, 1.9856)]),
    "no dense stage": (lines({1: 0.745, 10: 0.75}, 0.75), {}, [("steady", 1, 10, 2.004)]),
    "from above": (
        lines({1: 0.76, 10: 0.755, 20: 0.75}, 0.75),
        {},
        [("way", 1, 10, 1.956), ("steady", 11, 20, 2.0)],
    ),
    "a line without S": ([*lines({10: 0.75}, 0.75), line(20), *lines({30: 0.75}, 0.75)], {}, [("steady", 1, 30, 2.0)]),
    "a near-dense warm-up": ([line(10), line(20)], WARMUP, [("all", 1, 20, 5.0)]),
    "sums of pairs": (counts({10: 250, 20: 400}), {"moe_baseline_router": "top_p"}, [("all", 1, 20, 2.0)]),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_by_hand(name: str, tmp_path: Path) -> None:
    records, args, expected = STAGES[name]
    write_run(tmp_path, 50, *records, num_experts=8, moe_router_topk=2, **args)
    result = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
    found = [(stage.name, stage.first, stage.last, pytest.approx(stage.experts)) for stage in result]
    assert found == expected
    for stage in result:
        steps = 20 if name == "a line without S" else stage.last - stage.first + 1
        assert stage.hours == pytest.approx(steps * 0.1 / 3600)
        assert stage.flops == pytest.approx(4 * steps * (100 + 10 * (stage.experts - 2)))
    if name == "a ReMoE":
        assert (read(tmp_path).first_near, read(tmp_path).settled) == (25, 35)


def test_gaps_by_hand() -> None:
    def seeds(*losses: float) -> dict[int, dict[str, Any]]:
        return {seed: {"loss": loss, "inactive": (0, seed)} for seed, loss in enumerate(losses, 1)}

    lines = [
        tables.Line(("ReMoE",), seeds(1.50, 1.52, 1.51)),
        tables.Line(("top-k",), seeds(1.60, 1.62, 1.61, 9.99), seeds(1.502, 1.522, 1.511, 9.99), ("ReMoE",)),
    ]
    lines[0].matched = lines[0].seeds
    made = [*tables.markdown(["run"], lines)]
    cells = [cell.strip() for cell in made[3].split("|")]
    assert cells[3].startswith("+0.1000 ± ") and cells[3].endswith(" (3)") and cells[4] == "higher"
    assert cells[5].startswith("+0.0017 ± ") and cells[6] == "equivalent within 0.01"
    assert "0.0, 2.0" in made[2] and "2 comparisons" in made[5] and "Gaps differ by 0.0" in made[6]


def test_tables_and_panels_of_a_folder(tmp_path: Path) -> None:
    grid = Grid(tmp_path, TEXT)
    base = Run("remoe", steps=20)
    for seed in (1, 2):
        for run, loss in ((base, 1.5), (replace(base, arm="moe"), 1.6), (base.vary("l1-init", 1.0), 1.7)):
            finish_run(grid, replace(run, seed=seed), loss + seed / 100)
    finish_run(grid, replace(base, arm="moe", seed=3), 9.99)  # ReMoE has no run with this seed
    folder = make_run_folder(replace(base, arm="moe-hash"), grid)
    write_run(folder.path, 20, line(8))
    write_json(folder.path / STAMP, folder.stamp)
    (tmp_path / "else").mkdir()
    options = "--tiny --train-iters 20 --seeds 1 2 --figures size routing l1-init --collect --output-dir".split()
    output, _ = sweep(*options, str(tmp_path))
    page = (tmp_path / "results.md").read_text()
    assert re.search(r"\| 182m_moe_e8g1k1_steps20 \| 4\.4067 ± \S+ \| \+0\.1000 ± 0\.0000 \(2\) \| higher", page)
    assert f"- {folder.run.name}: not finished, at iteration 8 of 20" in page and page.count("| 182m") == 3
    assert "moe-hash" in output and imread(tmp_path / "results.png").size
    args = parse_arguments([*options, str(tmp_path)])
    rows = results.finished(results.read_folder(tmp_path))
    panels = [make_panel(figure, runs, rows) for figure, runs in list_figure_runs(args).items()]
    assert [panel.title for panel in panels] == ["size", "routing", "l1-init"]
    assert panels[2].lines[("remoe", "")] == {1e-8: [1.51, 1.52], 1.0: [1.71, 1.72]}


def test_runs_of_equal_flops() -> None:
    """ReMoE used the FLOPs of 60 more steps of top-k; dense costs more already."""
    run, remoe, dense = (Run(arm, steps=100) for arm in ("moe", "remoe", "dense"))
    used = {run: 1e9, remoe: 1.6e9, dense: 2e9}
    known = {each: results.Result(100, loss=2.0, flops=flops, step_flops=1e7) for each, flops in used.items()}
    assert compare.run_of_equal_flops(run, remoe, known) == replace(run, steps=160)
    assert compare.run_of_equal_flops(remoe, remoe, known) == remoe
    assert compare.run_of_equal_flops(dense, remoe, known) is None
    assert compare.run_of_equal_flops(replace(run, seed=2), remoe, known) is None
    missed = {replace(run, steps=160): results.Result(160, loss=2.0, flops=1.5e9, step_flops=1e7)}
    assert compare.run_of_equal_flops(run, remoe, known | missed) == replace(run, steps=170)
    met = {replace(run, steps=170): results.Result(170, loss=2.0, flops=1.59e9, step_flops=1e7)}
    assert compare.run_of_equal_flops(run, remoe, known | missed | met) == replace(run, steps=170)
