"""The documented script of somebody's own, and the package beside Megatron's."""

from pathlib import Path

import pytest

from tests.tiny_model import RELU
from tests.trainings import REPOSITORY, TINY, run, series


@pytest.mark.parametrize("layers", [[], ["--hybrid-layer-pattern", "*E*E"]], ids=["GPTModel", "HybridModel"])
def test_documented_script(layers: list[str], data: Path, tmp_path: Path) -> None:
    """It trains as the project's own program does."""
    script = REPOSITORY / "docs" / "own_training_script.py"
    arguments = [*TINY, *RELU, *layers, "--data-path", str(data)]
    output = run([*arguments, "--my-own-flag", "7", "--save", str(tmp_path), "--save-interval", "8"], script=script)
    assert "my_own_flag ..................................... 7" in output and "Training: ReMoE" in output
    assert (tmp_path / "metrics.jsonl").exists()
    assert series(output, "lm loss") == series(run(arguments), "lm loss")


def test_megatron_stays_a_namespace() -> None:
    assert not (REPOSITORY / "megatron" / "__init__.py").exists()
