"""The golden run: a tiny ReMoE whose loss, sparsity and λ are committed."""

import json
import subprocess
import sys

from tests.trainings import REPOSITORY
from tools import golden_run


def test_golden_run() -> None:
    command = [sys.executable, str(REPOSITORY / "tools" / "golden_run.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "same as the golden run" in result.stdout


def test_golden_run_reaches_the_target() -> None:
    figures = json.loads(golden_run.GOLDEN.read_text())
    last = figures[max(figures, key=int)]
    assert abs(last["sparsity"] - 0.875) < 0.03


def test_a_deviation_is_found(capsys) -> None:
    late = {"lm loss": 3.0, "sparsity": 0.5, "l1 coefficient": 1e-6}
    expected = {25: late, 30: late}
    near = {"lm loss": 3.001, "sparsity": 0.51, "l1 coefficient": 1.44e-6}
    assert golden_run.compare({25: late, 30: near}, expected)
    assert not golden_run.compare({25: near, 30: late}, expected)
    for name, value in (("lm loss", 3.1), ("sparsity", 0.55), ("l1 coefficient", 2e-6)):
        assert not golden_run.compare({25: late, 30: late | {name: value}}, expected)
    for name, value in (("lm loss", 3.001), ("sparsity", 0.502), ("l1 coefficient", 1.2e-6)):
        assert not golden_run.compare({25: late | {name: value}, 30: late}, expected)
    assert not golden_run.compare({}, expected)
    assert "DIFFERS" in capsys.readouterr().out
