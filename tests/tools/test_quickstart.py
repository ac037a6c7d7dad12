"""Test the quickstart: its figures, resuming after an interrupt, and a few iterations end to end."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron.remoe.start.checkpoint_files import newest_iteration
from tests.data_sets import write_small_corpus
from tests.training_runs import finish, wait_until
from tools.console.files import lock
from tools.console.places import ROOT
from tools.experiments import quickstart
from tools.experiments import quickstart_picture as picture
from tools.models.arguments import parse_evaluate as evaluate
from tools.models.arguments import parse_export as export
from tools.models.arguments import parse_generate as generate
from tools.recipes import tiny
from tools.runs.run_figures import TOTALS, Curve, RunFigures

ITERATIONS = 20


def test_sparsity_and_load_of_the_last_quarter() -> None:
    """Tokens have 4 active experts up to step 75 and 1 after it. Only loads after step 75 count."""
    figures = RunFigures(loads={at: {2: np.array([at, 0.0])} for at in (75, 80, 100)})
    for name, values in zip(TOTALS, ([75 * 4.0, 75 * 4.0 + 25], [75.0, 100.0]), strict=True):
        figures.curves[name] = Curve(np.array([75, 100]), np.array(values))
    assert quickstart.late_sparsity(figures, 100, 8) == pytest.approx(1 - 1 / 8)
    assert picture.late_load(figures, 100)[2] == pytest.approx([90, 0])


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools"), "quickstart", "--train-iters", str(ITERATIONS), *arguments],
        cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_end_to_end(tmp_path: Path) -> None:
    output_dir, arguments = tmp_path / "relative", ("--output-dir", "relative")
    write_small_corpus(output_dir / "corpus")
    runs = output_dir / f"iterations-{ITERATIONS}"

    # Interrupt the first run once it has a checkpoint.
    process, saves = start(*arguments, folder=tmp_path), runs / "dense" / "checkpoints"
    wait_until(lambda: newest_iteration(saves), process)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process, code=130)
    assert "The same command" in errors and "Traceback" not in errors
    cut = newest_iteration(saves)
    assert int(cut) > 0
    lock(output_dir, "quickstart").close()  # nothing is left running

    output, errors = finish(start(*arguments, folder=tmp_path), code=0)
    assert f"from iteration {cut}" in output and "\x1b" not in output + errors
    assert re.search(rf"dense: {ITERATIONS}/{ITERATIONS}  loss \d\.\d+  ", output)
    log = (runs / "dense" / "train.log").read_text()
    logged = [int(number) for number in re.findall(r"\] iteration +(\d+)/", log)]
    assert logged == list(range(1, ITERATIONS + 1)), "each iteration was trained once"
    summary = json.loads((runs / "summary.json").read_text())
    per_byte = assert_is_complete(summary, output_dir)
    drawn = imread(runs / "report.png")
    assert drawn.shape[:2] == (1100, 1600) and drawn.std() > 0.05
    for model in tiny.NAMES:
        log = (runs / model / "train.log").read_text()
        [printed] = re.findall(r"number of parameters on .*: (\d+)", log)[-1:]
        assert int(printed) == summary[model]["total_params"]
        for domain, loss in summary[model]["val_loss_by_domain"].items():
            values = re.findall(rf"validation-{domain} loss .* lm loss value: (\S+)", log)
            assert f"{loss:.3f}" in output and float(values[-1]) * per_byte[domain] == pytest.approx(loss, rel=1e-5)

    # All done: nothing is trained again.
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/**/*") if path.is_file()}
    output, _ = finish(start(*arguments, folder=tmp_path), code=0)
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/**/*") if path.is_file()} == before
    assert output.count(": reused, ") == 3 and re.search(r"against dense +[+-]0\.\d{3} +[+-]0\.\d{3}\n", output)
    assert json.loads((runs / "summary.json").read_text()) == summary
    assert not (output_dir / "summary.json").exists(), "only for the default number of iterations"

    # The commands that it suggests to try next parse, and their files exist.
    commands = [shlex.split(line) for line in output.partition("To try next")[2].splitlines()[1:]]
    parsers = {"generate": generate, "evaluate": evaluate, "export": export}
    assert [words[1] for words in commands] == [*parsers]
    for program, command, *words in commands:
        assert program == str(ROOT / ".venv" / "bin" / "remoe")
        parsers[command](words)
        assert (tmp_path / words[words.index("--load") + 1]).exists()


def assert_is_complete(summary: dict, folder: Path) -> dict[str, float]:
    """Check the figures of a summary, and return domain → held-out tokens per byte."""
    manifest, experts, length = json.loads((folder / "data-subwords" / "manifest.json").read_text()), 32, 128
    data, sizes = (manifest[kind]["heldout"] for kind in ("tokens", "bytes"))
    assert sum(data.values()) < sum(sizes.values()) / 2, "subwords"
    for model in tiny.NAMES:
        figures = summary[model]
        assert 1 < figures["val_loss"] < 3 and figures["tokens_per_second"] > 0
        weights = {domain: (n - 1) // length * length * sizes[domain] / n for domain, n in data.items()}
        mean = sum(figures["val_loss_by_domain"][domain] * n for domain, n in weights.items()) / sum(weights.values())
        assert figures["val_loss"] == pytest.approx(mean)
    dense, moe, remoe = (summary[model]["active_params"] for model in tiny.NAMES)
    assert remoe == moe == dense + tiny.SIZE.layers * tiny.SIZE.hidden * experts
    assert summary["remoe"]["sparsity_target"] == 1 - 1 / experts
    assert 1 - 4 / experts <= summary["remoe"]["sparsity_last_quarter"] < 1, "at most four experts are computed"
    return {domain: n / sizes[domain] for domain, n in data.items()}
