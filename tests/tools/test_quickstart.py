"""Test the quickstart: its figures, resuming after an interrupt, and a few iterations end to end."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console

from tests.data_sets import write_small_corpus
from tests.trainings import finish
from tools.console.files import lock
from tools.console.places import ROOT
from tools.experiments import quickstart
from tools.experiments import quickstart_picture as picture
from tools.experiments.execute import execute
from tools.experiments.jobs import Grid, Job
from tools.experiments.run import Run
from tools.models.evaluate.arguments import parse_arguments as evaluate
from tools.models.export.arguments import parse_arguments as export
from tools.models.generate.arguments import parse_arguments as generate
from tools.recipes import tiny
from tools.runs.figure_reader import read_figures
from tools.runs.run_figures import RunFigures

ITERATIONS = 20

# ---------------------------------------------------------------- figures

ROUTING_STEPS = 20 * tiny.SIZE.tokens_per_iteration * tiny.SIZE.layers  # tokens times layers in 20 iterations
PARAMETERS, EXPERTS = 1000, 7 * tiny.SIZE.layers * 3 * tiny.SIZE.hidden * tiny.SIZE.ffn


def records(model: str, number: int) -> list[dict[str, Any]]:
    """Return the log records of 100 iterations; ReMoE's S is 0.5 in the first 60 steps and then 0.875."""
    size = {"parameters": PARAMETERS + EXPERTS * (model != "dense"), "args": {"num_experts": 8} if number else {}}
    lines: list[dict[str, Any]] = [{"kind": "start", "time": 1.0, "iteration": 0} | size]
    pairs = tokens = 0.0
    for step in (1, *range(20, 101, 20)):
        line = {"kind": "log", "time": 2.0, "iteration": step, "lm_loss": 5.0 - 0.02 * step - 0.1 * number}
        seconds = 9.0 if step <= 20 else 0.5 + number
        line |= {"seconds_per_iteration": seconds, "tokens_per_second": tiny.SIZE.tokens_per_iteration / seconds}
        if model == "remoe":
            sparsity = 0.5 if step <= 60 else 0.875
            tokens += ROUTING_STEPS * (step > 1)
            pairs += ROUTING_STEPS * (step > 1) * 8 * (1 - sparsity)
            line |= {"sparsity": sparsity, "target_sparsity": 0.875, "l1_coefficient": 1e-8 * 1.2**step}
            line |= {"lowest_layer_sparsity": 0.4, "highest_layer_sparsity": 0.9}
            line |= {"total_active_pairs": int(pairs), "total_layer_tokens": int(tokens)}
            line["tokens_per_expert"] = {
                str(layer): [layer * expert * (1 + step) / 50 for expert in range(8)] for layer in (1, 2)
            }
        lines.append(line)
    for name, loss, tokens in (("code", 2.0, 300), ("drama", 3.0, 100)):
        losses = {"lm_loss": loss - 0.1 * number, "tokens": tokens, "final": True}
        lines.append({"kind": "validation", "iteration": 100, "set": name} | losses)
    return lines


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunFigures]:
    for number, model in enumerate(tiny.NAMES):
        folder = tmp_path / model / "checkpoints"
        folder.mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in records(model, number)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    return {model: read_figures(tmp_path / model) for model in tiny.NAMES}


def test_summary_of_written_figures(runs: dict[str, RunFigures]) -> None:
    summary = quickstart.summarize(runs, 100)
    assert summary["dense"]["val_loss"] == pytest.approx((2.0 * 300 + 3.0 * 100) / 400)
    assert summary["moe"]["val_loss_by_domain"] == pytest.approx({"code": 1.9, "drama": 2.9})
    assert summary["dense"]["tokens_per_second"] == pytest.approx(tiny.SIZE.tokens_per_iteration / 0.5)
    assert [summary[model]["active_params"] for model in tiny.NAMES] == [PARAMETERS] * 3
    assert [summary[model]["total_params"] - PARAMETERS for model in tiny.NAMES] == [0, EXPERTS, EXPERTS]
    assert summary["remoe"]["sparsity_target"] == 0.875
    assert summary["remoe"]["sparsity_last_quarter"] == pytest.approx(0.875)
    expected = [2 * expert * (81 + 101) / 2 / 50 for expert in range(8)]
    assert picture.late_load(runs["remoe"], 100)[2] == pytest.approx(expected)


def test_table_and_picture(runs: dict[str, RunFigures], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = quickstart.summarize(runs, 100)
    quickstart.print_summary(summary)
    text = capsys.readouterr().out
    assert re.search(r"2\.250 +2\.150 +2\.050\n", text) and re.search(r"against dense +-0\.100 +-0\.200\n", text)
    assert max(map(len, text.splitlines())) <= 80
    picture.draw(tmp_path / "report.png", runs, summary)
    assert_is_picture(tmp_path / "report.png")


def assert_is_picture(path: Path) -> None:
    picture = imread(path)
    assert picture.shape[:2] == (1100, 1600) and picture.std() > 0.05


def test_failing_run_shows_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pretrain_gpt.py"), "--cpu", "--no-such-flag"]
    stamp = {"settings": {"--global-batch-size": ["4"], "--seq-length": ["8"]}, "per_byte": None}
    job, output = Job(Run("dense", steps=10), tmp_path / "dense", stamp, command), io.StringIO()
    with lock(tmp_path, "quickstart") as held:
        assert execute(Console(file=output, width=200), Grid(tmp_path), [job], 1, held) == ["dense"]
    log = job.folder / "train.log"
    assert re.search("failed with exit code 2.*unrecognized arguments: --no-such-flag", output.getvalue(), re.DOTALL)
    assert f"The whole log: {log}" in output.getvalue() and "--no-such-flag" in log.read_text() and job.loss is None


# ---------------------------------------------------------------- end to end


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools"), "quickstart", *arguments], cwd=folder, text=True,
        env=os.environ | {"QUICKSTART_ITERS": str(ITERATIONS)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def saved_iteration(folder: Path) -> int:
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text() or 0) if tracker.exists() else 0


def test_end_to_end(tmp_path: Path) -> None:
    output_dir, arguments = tmp_path / "relative", ("--output-dir", "relative")
    write_small_corpus(output_dir / "corpus")
    runs = output_dir / f"iterations-{ITERATIONS}"

    # Interrupt the first training once it has a checkpoint.
    process = start(*arguments, folder=tmp_path)
    while process.poll() is None and not saved_iteration(runs / "dense"):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process, code=130)
    assert "The same command goes on from here" in errors and "Traceback" not in errors
    cut = saved_iteration(runs / "dense")
    assert cut > 0
    lock(output_dir, "quickstart").close()  # nothing is left running

    output, errors = finish(start(*arguments, folder=tmp_path), code=0)
    assert f"dense: goes on from iteration {cut}" in output and "\x1b" not in output + errors
    assert re.search(rf"dense: {ITERATIONS}/{ITERATIONS}  loss \d\.\d+  ", output)
    log = (runs / "dense" / "train.log").read_text()
    logged = [int(number) for number in re.findall(r"\] iteration +(\d+)/", log)]
    assert logged == list(range(1, ITERATIONS + 1)), "each iteration was trained once"
    summary = json.loads((runs / "summary.json").read_text())
    assert_is_complete(summary, output_dir)
    assert_is_picture(runs / "report.png")
    for model in tiny.NAMES:
        log = (runs / model / "train.log").read_text()
        [printed] = re.findall(r"number of parameters on .*: (\d+)", log)[-1:]
        assert int(printed) == summary[model]["total_params"]
        for domain, loss in summary[model]["val_loss_by_domain"].items():
            values = re.findall(rf"validation-{domain} loss .* lm loss value: (\S+)", log)
            assert f"{loss:.3f}" in output and float(values[-1]) == pytest.approx(loss, rel=1e-5)

    # All done: nothing is trained again.
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/**/*") if path.is_file()}
    output, _ = finish(start(*arguments, folder=tmp_path), code=0)
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/**/*") if path.is_file()} == before
    assert output.count(": reused, ") == 3
    assert json.loads((runs / "summary.json").read_text()) == summary
    assert not (output_dir / "summary.json").exists(), "that is the place of a whole training's"

    # What it says to try next can be parsed, and the files are there.
    commands = [shlex.split(line) for line in output.partition("To try next")[2].splitlines()[1:]]
    parsers = {"generate": generate, "evaluate": evaluate, "export": export}
    assert [words[1] for words in commands] == [*parsers]
    for program, command, *words in commands:
        assert program == str(ROOT / ".venv" / "bin" / "remoe")
        parsers[command](words)
        assert (tmp_path / words[words.index("--load") + 1]).exists()


def assert_is_complete(summary: dict, folder: Path) -> None:
    data = json.loads((folder / "data" / "manifest.json").read_text())["tokens"]["heldout"]
    for model in tiny.NAMES:
        figures = summary[model]
        assert 2 < figures["val_loss"] < 5.5 and figures["tokens_per_second"] > 0
        weights = {domain: (n - 1) // tiny.SIZE.sequence * tiny.SIZE.sequence for domain, n in data.items()}
        mean = sum(figures["val_loss_by_domain"][domain] * n for domain, n in weights.items()) / sum(weights.values())
        assert figures["val_loss"] == pytest.approx(mean)
    dense, moe, remoe = (summary[model]["active_params"] for model in tiny.NAMES)
    assert remoe == moe == dense + tiny.SIZE.layers * tiny.SIZE.hidden * tiny.SIZE.experts
    assert summary["remoe"]["sparsity_target"] == 1 - tiny.SIZE.topk / tiny.SIZE.experts
    assert 0 < summary["remoe"]["sparsity_last_quarter"] < 1
