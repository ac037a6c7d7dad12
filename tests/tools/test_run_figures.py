"""Test that logs of all kinds become the figures, tables and curves of the report."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.tools.sweeping import write_metrics
from tools.recipes.flops import Flops, training_flops
from tools.recipes.flops import stages as compute_stages
from tools.report.figures import panels
from tools.report.page import page as make_page
from tools.report.tables import headline
from tools.runs.figure_reader import read_figures
from tools.runs.run_figures import Curve, Evaluation, RunFigures

pytestmark = pytest.mark.filterwarnings("ignore")


def test_stages_of_a_run_that_continues_another(tmp_path: Path) -> None:
    """The stage starts at the log's first step. Only experts up to the limit count. The total FLOPs are unknown."""
    args = {"num_experts": 32, "moe_router_topk": 1, "moe_relu_routing": True, "moe_relu_max_experts": 4}
    args |= {"global_batch_size": 2, "train_iters": 40, "log_interval": 10}
    rows: list[dict[str, object]] = [
        {"kind": "log", "iteration": at, "sparsity": 0.5, "target_sparsity": 31 / 32, "seconds_per_iteration": 0.1}
        | {"layer_sparsity": {"1": 0.5}, "tokens_per_expert": {"1": [at] + [1] * 31}}
        for at in (30, 40)
    ]
    folder = write_metrics(tmp_path / "run", args, *rows)
    start, *lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([start.replace('"iteration": 0', '"iteration": 20'), *lines]))
    figures = read_figures(folder)
    [stage] = compute_stages(figures, Flops(10.0, 1.0))
    assert (stage.first, stage.last, stage.experts, stage.flops) == (21, 40, 4.0, 20 * 2 * (10.0 + 3.0))
    assert training_flops(figures) is None
    [experts] = (panel for panel in panels([figures])["Routing"] if panel.title == "Experts per token")
    layers, mean, *_ = (renderer.data_source.data for renderer in experts.plot.renderers)
    [load] = panels([figures])["Load of the experts"]
    assert load.plot.renderers[0].glyph.x == 20 and load.plot.x_range.start == 20
    assert [*layers["ys"][0]] == [16.0] * 2 and [*mean["y"]] == [4.0] * 2, "positive gates, and computed experts"


def test_experts_per_token_of_a_baseline(tmp_path: Path) -> None:
    args = {"global_batch_size": 4, "num_experts": 8, "moe_router_topk": 2, "moe_baseline_router": "top_p"}
    pairs = ((10, 300), (20, 450))
    rows = [{"kind": "log", "iteration": at, "total_active_pairs": n, "total_layer_tokens": 10 * at} for at, n in pairs]
    run = read_figures(write_metrics(tmp_path / "run", args, *rows), "run")
    assert [panel.title for panel in panels([run])["Routing"]] == ["Experts per token"]
    assert run.experts_per_token(np.array([10, 20, 30])).tolist() == [3.0, 1.5, 2.0], "k without counts"


@pytest.mark.parametrize("target", [None, 0.75])
def test_a_batch_that_grows(target: float | None, tmp_path: Path) -> None:
    """FLOPs follow the samples since the previous line, not the batch size at the start of the run."""
    args = {"global_batch_size": 16, "seq_length": 10, "num_experts": 8, "moe_router_topk": 2}
    routing = {} if target is None else {"sparsity": target, "target_sparsity": target}
    batches, samples = {10: 4, 20: 8, 30: 16}, {10: 40, 20: 100, 30: 260}  # it grew before step 17
    line, sizes = {"kind": "log", "seconds_per_iteration": 2.0, **routing}, batches.items()
    rows = [line | {"iteration": at, "global_batch_size": n, "tokens_per_second": 5.0 * n} for at, n in sizes]
    rows = [row | {"consumed_samples": samples[row["iteration"]]} for row in rows]
    figures = read_figures(write_metrics(tmp_path / "run", args, *rows))
    assert figures.tokens_per_second == 60.0  # without the first line
    stages = compute_stages(figures, Flops(100.0, 10.0))
    assert sum(stage.flops for stage in stages) == pytest.approx(100.0 * 260)
    assert sum(stage.hours for stage in stages) == pytest.approx(30 * 2.0 / 3600)


def test_the_headline_compares_to_dense() -> None:
    def run(name: str, loss: float, **args: object) -> RunFigures:
        return RunFigures(args, {"lm_loss": Curve(np.array([5]), np.array([loss]))}, last=5, name=name)

    runs = [run("dense", 1.79), run("fine", 1.678, num_experts=8, moe_relu_routing=True)]
    assert headline(runs) == "fine 1.678, −0.112 vs. dense; dense 1.790 (training loss, nats per token)"
    assert headline([RunFigures()]) == ""
    for each in runs:
        each.evaluations[""], each.per_byte = [Evaluation(4, 1.8, True, 0)], {"": 0.5}
    assert "fine 1.800 (0.900), " in headline(runs) and "nats per token (per byte)" in headline(runs)


@pytest.mark.parametrize(("tokens", "expected"), [((300, 100), 2.25), ((300, 0), 2.5)], ids=["all", "unknown"])
def test_a_validation_loss_is_the_mean_of_all_tokens(tokens: tuple[int, int], expected: float) -> None:
    """Sets are weighted by tokens, as in the quickstart; without token counts (older logs) all weigh the same."""
    losses = {"a": (2.0, tokens[0]), "b": (3.0, tokens[1]), "test": (9.0, 1)}
    figures = RunFigures(evaluations={name: [Evaluation(5, loss, True, n)] for name, (loss, n) in losses.items()})
    assert figures.validation_loss == expected


LINE = {"kind": "log", "iteration": 1, "lm_loss": 3.0, "sparsity": 0.75, "layer_sparsity": {"1": 0.7, "2": 0.8}}
ODD = {
    "empty": ("", 0, 0),
    "cut off": (json.dumps(LINE) + "\n" + json.dumps(LINE)[:50], 1, 1),
    "two processes": (json.dumps(LINE) * 2 + "\n" + json.dumps(LINE | {"iteration": 2}), 1, 1),
    "not finite": ('{"kind": "log", "iteration": 1, "lm_loss": NaN, "sparsity": Infinity}\n' + json.dumps(LINE), 1, 0),
    "other types": ('[1]\n{"kind": "log", "iteration": 1, "layer_sparsity": {"x": 1.0}}\n{"kind": []}\n', 0, 3),
    "twice": (json.dumps(LINE | {"lm_loss": 9.0}) + "\n" + json.dumps(LINE), 1, 0),
    "a validation without its loss": ('{"kind": "validation", "iteration": 1}\n' + json.dumps(LINE), 1, 0),
    "deep": ("[" * 100_000 + "\n" + json.dumps(LINE), 1, 1),
    "zeros": (json.dumps(LINE) + "\n" + "\0" * 5000 + "\n", 1, 1),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_line_is_left_out(name: str, tmp_path: Path) -> None:
    text, lines, unread = ODD[name]
    run = read_figures(write_metrics(tmp_path, {"train_iters": 20}, text), "run")
    notes = [f"run: cannot read {unread} of its log's lines; ignored them."] if unread else []
    assert run.curve("lm_loss").values.tolist() == [3.0] * lines and run.notes == notes
    assert "<html" in make_page([run])


def test_a_long_log_is_bounded(tmp_path: Path) -> None:
    """The report takes 2 s on an idle machine (quadratic code took minutes). Curves lose points but no spikes."""
    lines = 200_000
    start = {"kind": "start", "iteration": 0, "args": {"num_experts": 4, "moe_router_topk": 1, "train_iters": lines}}
    line = '{"kind": "log", "iteration": %d, "lm_loss": %s, "sparsity": 0.75, "tokens_per_expert": {"1": [0.1, 0.2]}}\n'
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(start) + "\n")
        file.writelines(line % (at, 99.0 if at == 123_456 else 2.0) for at in range(1, lines + 1))
    began = time.process_time()
    run = read_figures(tmp_path, "run")
    text = make_page([run])
    assert time.process_time() - began < 20 and len(text) < 3e6
    assert run.last == lines and max(run.loads) == lines
    (training,) = panels([run])["Loss"]
    drawn = [renderer.data_source.data for renderer in training.plot.renderers]
    assert max(len(data["x"]) for data in drawn) <= 1000 and max(drawn[0]["y"]) == 99.0
