"""The one patch of Megatron outside the CPU part: its data helpers are not compiled where they cannot be.

Megatron's start-up runs `make` beside its data sets and ends the process if that fails. A released wheel holds the
compiled helpers and no Makefile, so that no training starts from it, on a GPU neither.
"""

import importlib
from pathlib import Path

from megatron.core.datasets import utils


def use_shipped_helpers() -> None:
    """Skip the compilation where there is no Makefile and the compiled helpers are there."""
    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    utils.compile_helpers = lambda: None
