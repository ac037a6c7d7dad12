"""Fixtures for the GPU tests: the machine that runs them, and the report of their figures."""

from pathlib import Path

import pytest
import torch

from tests.gpu.report import Report
from tests.gpu.runs import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Return this machine; skip the test if it has no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return Machine(tmp_path, torch.cuda.get_device_name())


@pytest.fixture
def report(request: pytest.FixtureRequest, machine: Machine) -> Report:
    """Return the report for the test's figures; skip the test if its figures are already there."""
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    kept = Report(request.config.getoption("--gpu-report") or machine.folder, machine.card, name)
    if kept.path.exists():
        pytest.skip(f"its figures are in {kept.path}")
    return kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    folder: Path | None = config.getoption("--gpu-report")
    for path in sorted(folder.glob("*/report.md")) if folder else []:
        terminalreporter.write_line(f"{path.read_text(encoding='utf-8')}Report: {path}")
