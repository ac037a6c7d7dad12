"""Start without Megatron's Makefile."""

import importlib
from pathlib import Path

from megatron.core.datasets import utils
from megatron.remoe.patches.patch import patch


@patch(
    changes="core/datasets/utils.py: compile_helpers",
    provides="a start without Megatron's Makefile, which is missing from the wheel",
    ends="compile_helpers uses the compiled helpers, or the wheel contains the Makefile",
)
def use_shipped_helpers() -> None:
    """Use the compiled data helpers of the wheel instead of running `make`, which ends the process if it fails."""
    if not (Path(utils.__file__).parent / "Makefile").exists():
        importlib.import_module("megatron.core.datasets.helpers_cpp")
        utils.compile_helpers = lambda: None
