"""Make checkpoints for the tests of this folder to damage."""

from pathlib import Path

import pytest

from tests.checkpoints import Saved, training
from tests.tiny_model import RELU
from tests.training_runs import TINY, run

L1 = [*RELU, "--moe-relu-l1-reg-coeff-init", "1e-3"]  # large enough for its gradient to change the losses


@pytest.fixture(scope="session")
def initial(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the flags that start a run of any layout from one checkpoint; each layout draws other initial weights."""
    folder = tmp_path_factory.mktemp("initial")
    run([*TINY, *L1, "--data-path", str(data), "--train-iters", "1", "--save", str(folder), "--save-interval", "1"])
    return ["--load", str(folder), "--finetune"]


@pytest.fixture(scope="session")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Train without interruption, and return the checkpoints of iterations 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(training(data, folder))
    return Saved(folder)


@pytest.fixture
def saved(uninterrupted: Saved, tmp_path: Path) -> Saved:
    """Return a copy of the checkpoints that the test can damage."""
    return uninterrupted.copy(tmp_path / "checkpoints")
