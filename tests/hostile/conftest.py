"""Fixtures of the hostile tests: an undisturbed training, copies of it to disturb, and a table of the results."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data_sets import write_real_text
from tests.hostile.trials import SAVED, STEPS, Trial, training
from tests.trainings import run

Noted = Callable[[str, str, int], None]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with data, `expected` (a whole training) and `run` (the same, stopped after its second save)."""
    folder = tmp_path_factory.mktemp("whole")
    write_real_text(folder / "text")
    run(training(folder, "expected"))
    run([*training(folder, "run"), "--exit-interval", str(SAVED)])
    return folder


@pytest.fixture
def trial(whole: Path, tmp_path: Path) -> Trial:
    """Return a copy that a test may damage; copying is cheaper than training."""
    for name in ("text.bin", "text.idx"):
        shutil.copy(whole / name, tmp_path)
    for name in ("run", "text"):  # the index cache is in text
        shutil.copytree(whole / name, tmp_path / name)
    return Trial(tmp_path, whole / "expected", STEPS)


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Noted:
    """Return a function that counts trials by kind and result."""
    return lambda kind, result, count=1: record_property("hostile", (kind, result, count))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of trials of each kind, and their results."""
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        if report.when == "call" and "test_broken_folders.py" in report.nodeid:
            counts["broken folders", "refused"] += 1
        for name, value in report.user_properties:
            if name == "hostile":
                counts[value[0], value[1]] += value[2]
    if counts:
        terminalreporter.section("hostile trials that passed")
    for kind in dict.fromkeys(kind for kind, _ in sorted(counts)):
        parts = {result: number for (of, result), number in sorted(counts.items()) if of == kind}
        details = ", ".join(f"{number} {result}" for result, number in parts.items())
        terminalreporter.write_line(f"{kind:28} {sum(parts.values()):4}: {details}")
