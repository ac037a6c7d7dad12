"""Start without Megatron's Makefile, and print the time left."""

import importlib
import re
from pathlib import Path
from typing import Any

from megatron.core.datasets import utils
from megatron.remoe.files.errors import UsageError
from megatron.remoe.patches.patch import patch, replace
from megatron.training import get_args, training

_LINE = re.compile(r" iteration +(\d+)/ *(\d+) \|.* elapsed time per iteration \(ms\): ([\d.]+) \|")


@patch(
    changes="core/datasets/utils.py: compile_helpers",
    provides="a start without Megatron's Makefile, which is missing from the wheel",
    ends="compile_helpers uses the compiled helpers, or the wheel contains the Makefile",
)
def use_shipped_helpers() -> None:
    """Use the compiled data helpers of the wheel instead of running `make`, which ends the process if it fails."""
    if not (Path(utils.__file__).parent / "Makefile").exists():
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError as error:
            raise UsageError(
                "megatron-core was built without its C++ part. Install a C++ compiler and Python's headers, then: "
                "pip install --force-reinstall --no-deps --no-cache-dir megatron-core",
                "REMOE-E102",
            ) from error
        utils.compile_helpers = lambda: None


@patch(
    changes="training/training.py: print_rank_last",
    provides="the time left in each line of the log",
    ends="Megatron prints it",
)
def print_time_left() -> None:
    """Append the hours left to the line of each log interval, from the interval's time per step."""

    @replace(training, "print_rank_last")
    def printing(stock: Any, message: str) -> None:
        line = _LINE.search(message)
        if line and int(line[1]) % get_args().log_interval == 0:
            hours = (int(line[2]) - int(line[1])) * float(line[3]) / 3.6e6
            message += f" time left (h): {hours:.2f} |"
        stock(message)
