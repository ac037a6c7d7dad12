"""The golden run gives the committed figures; `pytest tests/training/test_golden.py --update-golden` renews them."""

from pathlib import Path

import pytest

from tests.golden_run import FLAGS, GOLDEN, ROUNDING, committed, differences, figures_of, write_data
from tests.trainings import run
from tools.common.files import write_json


def test_golden_run(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write_data(tmp_path / "text")
    found = figures_of(run([*FLAGS, "--data-path", str(tmp_path / "text"), "--cpu"], **ROUNDING))
    if request.config.getoption("--update-golden"):
        write_json(GOLDEN, found)
    assert differences(found, committed()) == []


def test_golden_run_reaches_the_target() -> None:
    figures = committed()
    assert abs(figures[max(figures)]["sparsity"] - 0.875) < 0.03


def test_a_deviation_is_found() -> None:
    late = {"lm loss": 3.0, "sparsity": 0.5, "l1 coefficient": 1e-6}
    expected = {25: late, 30: late}
    near = {"lm loss": 3.001, "sparsity": 0.51, "l1 coefficient": 1.44e-6}
    assert differences({25: late, 30: near}, expected) == []
    assert differences({25: near, 30: late}, expected)
    for name, value in (("lm loss", 3.1), ("sparsity", 0.55), ("l1 coefficient", 2e-6), ("lm loss", float("nan"))):
        assert differences({25: late, 30: late | {name: value}}, expected)
    for name, value in (("lm loss", 3.001), ("sparsity", 0.502), ("l1 coefficient", 1.2e-6)):
        assert differences({25: late | {name: value}, 30: late}, expected)
    assert differences({}, expected)
