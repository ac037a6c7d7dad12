"""The benchmarks' files, in this process."""

import importlib
from types import ModuleType

import pytest

from tests.trainings import REPOSITORY


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of benchmarks/ in this process."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module(name)
