"""Fixtures for the GPU tests: the machine that runs them, and the report of their figures."""

import re
from collections.abc import Generator
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
    name = re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-")
    kept = Report(request.config.getoption("--gpu-report") or machine.folder, machine.card, name)
    if kept.path.exists():
        pytest.skip(f"its figures are in {kept.path}")
    return kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print a failure at once: a time limit can end the session before its summary."""
    result = yield
    if result.failed:
        item.config.get_terminal_writer().line(f"\n{item.name}: {result.longreprtext}"[-3000:], flush=True)
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    folder: Path | None = config.getoption("--gpu-report")
    for path in sorted(folder.glob("*/report.md")) if folder else []:
        terminalreporter.write_line(f"{path.read_text(encoding='utf-8')}Report: {path}")
