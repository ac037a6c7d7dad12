"""Test examples/own_training_script.py, and the start of data loaders."""

from pathlib import Path

import pytest

from tests.tiny_model import RELU
from tests.training_runs import ENTRY, REPOSITORY, TINY, run, series, without

SCRIPT = REPOSITORY / "examples" / "own_training_script.py"
DEFAULT_OF_PYTHON_3_14 = """
import multiprocessing, runpy
default = multiprocessing.context._default_context
default._actual_context, default._default_context = None, multiprocessing.get_context("forkserver")
"""


@pytest.mark.parametrize("layers", [[], ["--hybrid-layer-pattern", "*E*E"]], ids=["GPTModel", "HybridModel"])
def test_documented_script(layers: list[str], data: Path, tmp_path: Path) -> None:
    """The script trains like the project's own program."""
    arguments = [*TINY, *RELU, *layers, "--data-path", str(data)]
    output = run([*arguments, "--my-own-flag", "7", "--save", str(tmp_path), "--save-interval", "8"], script=SCRIPT)
    assert "my_own_flag ..................................... 7" in output and "Training: ReMoE" in output
    assert (tmp_path / "metrics.jsonl").exists()
    assert series(output, "lm loss") == series(run(arguments), "lm loss")


def test_documented_script_without_data(tmp_path: Path) -> None:
    assert len(series(run([*TINY, *RELU, "--mock-data", "--train-iters", "2"], script=SCRIPT), "lm loss")) == 2
    output = run([*TINY, *RELU, "--data-path", str(tmp_path / "nowhere")], expect=2, script=SCRIPT)
    assert "REMOE-E301" in output and "Traceback" not in output
    output = run([*without(TINY, "--eval-interval"), "--mock-data"], expect=2, script=SCRIPT)
    assert "REMOE-E201" in output and "Traceback" not in output


def test_documented_script_ends_after_an_error(tmp_path: Path) -> None:
    """With --exit-signal-handler, data loader workers ignore the signal that should end them."""
    words = [*TINY, *RELU, *"--mock-data --num-workers 1 --exit-signal-handler --lr 1e30 --min-lr 1e30".split()]
    assert "error: RuntimeError" in run(words, expect=1, script=SCRIPT)


def test_data_loaders_start_in_newer_pythons(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(f"{DEFAULT_OF_PYTHON_3_14}runpy.run_path({str(ENTRY)!r}, run_name='__main__')")
    arguments = [*TINY, *RELU, "--data-path", str(data), "--train-iters", "2", "--num-workers", "1"]
    assert len(series(run(arguments, script=script), "lm loss")) == 2
