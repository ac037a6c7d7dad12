"""Test the golden run's figures; `pytest tests/training/test_golden.py --update-golden` renews the committed ones."""

from pathlib import Path

import pytest

from tests.golden_run import FLAGS, GOLDEN, ROUNDING, committed, differences, read_figures, write_data
from tests.training_runs import run
from tools.console.files import write_json


def test_golden_run(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_data(tmp_path / "text")
    actual = read_figures(run([*FLAGS, "--data-path", str(tmp_path / "text"), "--cpu"], fresh=True, **ROUNDING))
    if request.config.getoption("--update-golden"):
        write_json(GOLDEN, actual)
    assert differences(actual, committed()) == []
