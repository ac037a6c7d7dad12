"""Make checkpoints for the tests of this folder to damage."""

from pathlib import Path

import pytest

from tests.checkpoints import Saved, training
from tests.training_runs import run


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
