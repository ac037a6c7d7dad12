"""What the sweep reads from the logs of runs, its tables and its picture."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.tools.sweeping import FINAL, evaluated, logged, sweep, write_run
from tests.trainings import REPOSITORY
from tools.common.figure_reader import read_figures
from tools.common.log_reader import read_log
from tools.sweep import plan, results, run_log, scaling_picture, settings, stages
from tools.sweep.plan import Run

# ---------------------------------------------------------------- what counts as finished


@pytest.mark.parametrize(
    ("log", "loss"),
    [
        (logged(20, 20) + evaluated(20, "", 5.0), None),  # the evaluation on the way
        (logged(10, 20) + evaluated(10, FINAL, 5.0), None),  # of an earlier, shorter training
        (logged(20, 20) + evaluated(20, " on test set", 5.0), None),
        (logged(20, 20) + evaluated(20, "", 5.0) + evaluated(20, FINAL, 4.5), 4.5),
    ],
)
def test_only_the_final_validation_loss_finishes_a_run(tmp_path: Path, log: str, loss: float | None) -> None:
    write_run(tmp_path / "run", 20, log)
    outcome = run_log.read_outcome(tmp_path / "run")
    assert outcome is not None and outcome.validation_loss == loss and outcome.finished == (loss is not None)


def test_figures_of_a_resumed_run(tmp_path: Path) -> None:
    sparse = " sparsity: 0.740000 | target sparsity: 0.750000 |"
    lines = [logged(1, 25, milliseconds=900), logged(10, 25), logged(20, 25), logged(20, 25, sparse, milliseconds=200)]
    write_run(tmp_path / "run", 25, "".join(lines) + evaluated(25, FINAL, 4.5))
    outcome = run_log.read_outcome(tmp_path / "run")
    assert outcome == run_log.Outcome(
        iterations=25,
        train_iters=25,
        tokens=25 * 4 * 64,
        validation_loss=4.5,
        perplexity=pytest.approx(math.exp(4.5)),
        sparsity=0.74,
        target_sparsity=0.75,
        settled=None,
        tokens_per_second=pytest.approx(4 * 64 * (10 + 5) / 2),
        training_seconds=pytest.approx(0.9 + 9 * 0.1 + 10 * 0.2),
    )
    assert settings.processes(tmp_path / "run") == 8
    assert run_log.read_outcome(tmp_path / "nothing") is None


def remoe(iteration: int, sparsity: float) -> str:
    return logged(iteration, 50, f" sparsity: {sparsity:.6f} | target sparsity: 0.750000 |")


def test_stages_of_a_remoe(tmp_path: Path) -> None:
    """By hand, of 8 experts with k = 2; a line of the log stands for the iterations since the one before."""
    path = [0.50, 0.51, 0.53, 0.70, 0.745, 0.76, 0.744, 0.755, 0.75, 0.75]
    lines = "".join(remoe(5 * place, s) for place, s in enumerate(path, start=1))
    write_run(tmp_path / "run", 50, lines, more="--num-experts 4 --moe-granularity 2")
    outcome = run_log.read_outcome(tmp_path / "run")
    assert outcome is not None and outcome.settled == 35
    figures = run_log.read_run_figures(tmp_path / "run")
    assert figures is not None
    dense, way, steady = stages.stages(figures, stages.Flops(sequence=100.0, expert=10.0))
    assert (dense.first, dense.last, way.first, way.last, steady.first, steady.last) == (1, 10, 11, 35, 36, 50)
    assert dense.experts == pytest.approx(8 * (0.50 + 0.49) / 2)
    assert way.hours == pytest.approx(25 * 0.1 / 3600)
    assert dense.flops == pytest.approx(4 * 5 * ((100 + 10 * (4 - 2)) + (100 + 10 * (3.92 - 2))))


def test_stages_count_the_running_sums_of_all_steps(tmp_path: Path) -> None:
    """S is of the logged step alone; the pairs between two lines are known."""
    args = {"num_experts": 8, "moe_router_topk": 2, "global_batch_size": 4}
    records: list[dict[str, object]] = [{"kind": "start", "iteration": 0, "args": args}]
    for iteration, pairs, s in ((10, 700, 0.1), (20, 1000, 0.75)):
        sums = {"total_active_pairs": pairs, "total_layer_tokens": 10 * iteration}
        line = {"kind": "log", "iteration": iteration, "seconds_per_iteration": 1, "sparsity": s, **sums}
        records.append(line | {"target_sparsity": 0.75})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    dense, way = stages.stages(read_figures(tmp_path), stages.Flops(sequence=100.0, expert=10.0))
    assert (dense.last, dense.experts, way.experts) == (10, 7.0, 3.0)
    assert dense.flops == 10 * 4 * (100 + 10 * (7 - 2))


def test_flips_are_those_late_in_the_training(tmp_path: Path) -> None:
    rates = [0.3, 0.2, 0.1, 0.02, 0.04]
    lines = [logged(place, 9, f" flip rate: {rate:f} | flip count: {8 * rate:f} |") for place, rate in enumerate(rates)]
    write_run(tmp_path / "run", 9, "".join(lines) + logged(8, 9))
    outcome = run_log.read_outcome(tmp_path / "run")
    assert outcome is not None and (outcome.flip_rate, outcome.flip_count) == (0.04, 0.32)


def test_reads_a_log_of_the_authors_fork(tmp_path: Path) -> None:
    """As its training loop prints arguments and figures; there is no command.sh."""
    arguments = {"train_iters": 20, "seq_length": 64, "num_experts": 8, "moe_router_topk": 1, "world_size": 4}
    arguments |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    text = "".join(f"  {name} {'.' * 10} {value}\n" for name, value in arguments.items())
    figures = " l1_reg_loss: 3.0E-01 | moe relu sparsity: 0.8750 | moe relu l1 reg coeff: 1.2000E-08 |"
    folder = tmp_path / "llama_182m_remoe_e8g1_fork"
    folder.mkdir()
    (folder / "train.log").write_text(text + logged(20, 20, figures) + evaluated(20, FINAL, 4.5))
    outcome = run_log.read_outcome(folder)
    assert outcome is not None and (outcome.sparsity, outcome.target_sparsity, outcome.settled) == (0.875, 0.875, 20)
    assert (outcome.validation_loss, outcome.tokens) == (4.5, 20 * 4 * 64)
    record = read_log((folder / "train.log").read_text())[20]
    assert record["l1 coefficient after the update"] == "1.2000E-08" and record["mean l1 loss of a layer"] == "3.0E-01"
    sweep("--collect", "--output-dir", str(tmp_path))
    assert (
        "| 182M | ReMoE, fork | 8 | 1 | 4.5000 | 90.017 | 0.8750 (0.8750) | 20 |"
        in (tmp_path / "results.md").read_text()
    )


@pytest.mark.parametrize("arguments", ["", "  train_iters .......... 20\n"])
@pytest.mark.parametrize(("name", "target"), [("llama_182m_remoe_e8g1_fork", 0.875), ("run", None)])
def test_a_log_of_the_fork_without_its_arguments(
    name: str, target: float | None, arguments: str, tmp_path: Path
) -> None:
    """E is known by the name of the folder alone."""
    figures = " moe relu sparsity: 0.8750 | moe relu l1 reg coeff: 1.2000E-08 |"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "train.log").write_text(arguments + logged(20, 20, figures) + evaluated(20, FINAL, 4.5))
    outcome = run_log.read_outcome(folder)
    assert outcome is not None and (outcome.sparsity, outcome.target_sparsity) == (0.875, target)
    assert (outcome.validation_loss, outcome.iterations, outcome.tokens) == (4.5, 20, None)
    row = results.Row(Run("182m", "remoe", 8, 1, protocol="fork"), outcome, 0, False)
    results.collect(tmp_path, [row])
    assert "| 4.5000 | 90.017 | 0.8750" in (tmp_path / "results.md").read_text()


def test_metrics_are_read_instead_of_the_printed_log(tmp_path: Path) -> None:
    write_run(tmp_path, 20, logged(20, 20) + evaluated(20, FINAL, 9.0))
    args = {"train_iters": 20, "eval_interval": 10, "seq_length": 64, "global_batch_size": 4}
    start = {"kind": "start", "iteration": 0, "args": args}
    line = {"kind": "log", "iteration": 20, "consumed_samples": 80, "seconds_per_iteration": 0.5}
    evaluations = [{"kind": "validation", "iteration": at, "lm_loss": loss} for at, loss in ((10, 5.0), (20, 4.0))]
    final = [{"kind": "validation", "iteration": 20, "lm_loss": 3.5, "final": True}]
    (tmp_path / "checkpoints").mkdir()
    for records, loss in (([], None), (final, 3.5), ([final[0] | {"set": "test"}], None)):
        lines = [json.dumps(record) + "\n" for record in (start, line, *evaluations, *records)]
        (tmp_path / "checkpoints" / "metrics.jsonl").write_text("".join(lines))
        outcome = run_log.read_outcome(tmp_path)
        assert outcome is not None and outcome.validation_loss == loss  # at 20, on the way, is none
        assert (outcome.tokens, outcome.training_seconds, outcome.tokens_per_second) == (80 * 64, 10.0, 512.0)


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
    write_run(tmp_path / "llama_182m_remoe_e4g1", 20, logged(20, 20) + evaluated(20, FINAL, 4.25))
    write_run(tmp_path / "llama_182m_moe_e4g1", 20, logged(8, 20), more="--hidden-size 64")
    write_run(tmp_path / "llama_182m_moe_e8g1", 10, logged(10, 10) + evaluated(10, FINAL, 4.5))
    write_run(tmp_path / "else", 10, logged(10, 10) + evaluated(10, FINAL, 4.5))
    output, _ = sweep("--collect", "--output-dir", str(tmp_path))
    assert re.search(r"llama_182m_moe_e4g1 +at 8/20 ", output) and "llama_182m_remoe_e4g1           4.2500" in output
    lines = [line for line in output.split("\n\n")[1].splitlines() if str(tmp_path) not in line]
    assert lines and max(map(len, lines)) <= 80
    with (tmp_path / "results.csv").open() as file:
        rows = [(row["run"], row["state"], row["validation_loss"], row["processes"]) for row in csv.DictReader(file)]
    assert rows == [
        ("llama_182m_moe_e4g1", "unfinished", "", "8"),
        ("llama_182m_remoe_e4g1", "finished", "4.25", "8"),
        ("llama_182m_moe_e8g1", "finished", "4.5", "8"),
    ]
    markdown = (tmp_path / "results.md").read_text()
    assert "| 182M | MoE | 4 | 1 | at 8/20 |" in markdown
    assert "different numbers of tokens (2,560, 5,120)" in markdown and "dimensions of these models" in markdown
    assert imread(tmp_path / "results.png").size
    assert not list(tmp_path.glob("*.new*"))


def test_picture_has_a_panel_for_each_axis(tmp_path: Path) -> None:
    def width(points: list[tuple[Run, float]]) -> int:
        scaling_picture.draw(tmp_path / "picture.png", points, resized=False)
        return int(imread(tmp_path / "picture.png").shape[1])

    runs = plan.plan(plan.FIGURES, {}, None)
    all_points = [(run, 2.0 - place / 100) for place, run in enumerate(runs)]
    assert width(all_points) == 1500
    l1_points = [(run, 2.0) for run in plan.plan(["l1-init", "l1-multiplier"], {}, None)]
    assert width([*all_points, *l1_points]) == 2500
    compared = [(run, 2.0) for run in plan.plan([plan.COMPARED], {}, None)]
    assert width([*all_points, *compared]) == 2000
    assert width([*all_points, *l1_points, *compared]) == 2500  # in two rows
    assert width([point for point in all_points if point[0].size == "182m"]) == 1000
    for run in (runs[0], Run("182m", "remoe", 8, 1).at("l1-init", 1e-16)):
        assert width([(run, 2.0)]) == 1000  # one run: a panel of its own


def test_docs_tell_of_every_routing_and_setting() -> None:
    text = (REPOSITORY / "docs" / "baselines.md").read_text()
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE)) == {*plan.KINDS, *plan.AXES}
    for name, axis in plan.AXES.items():
        [row] = re.findall(rf"^\| `{name}` \|.*\| (.*) \| `--{name}s` \|$", text, re.MULTILINE)
        [base] = re.findall(r"\*\*(.*)\*\*", row)
        assert [float(value.strip("*")) for value in row.split()] == [*axis.values] and float(base) == axis.base
