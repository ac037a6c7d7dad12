"""Start without Megatron's Makefile."""

import importlib
from pathlib import Path

from megatron.core.datasets import utils
from megatron.remoe.files.errors import UsageError
from megatron.remoe.patches.patch import patch, replace


@patch(
    changes={"core.datasets.utils:compile_helpers": "84029a50"},
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
        replace(utils, "compile_helpers")(lambda _stock: None)
