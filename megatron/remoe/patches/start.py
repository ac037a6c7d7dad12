"""What a run of Megatron needs to start, and to count its operations."""

import importlib
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.datasets import utils
from megatron.training import training


def use_shipped_helpers() -> None:
    """Skip the compilation of the data helpers where there is no Makefile and the compiled ones are there.

    Megatron's start-up runs `make` beside its data sets and ends the process if that fails. A released wheel holds the
    compiled helpers and no Makefile, so that no training starts from it, on a GPU neither.
    """
    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    utils.compile_helpers = lambda: None


def count_operations_of_warmup() -> None:
    """Count a step of a near-dense warm-up by its own k, in throughput and in the total that checkpoints keep."""
    count = training.num_floating_point_operations
    if hasattr(count, "__wrapped__"):
        return

    @wraps(count)
    def count_by_step(args: Any, *rest: Any, **options: Any) -> Any:
        if getattr(args, "moe_warmup_topk", None) and args.curr_iteration < args.moe_warmup_steps:
            args = SimpleNamespace(**vars(args) | {"moe_router_topk": args.moe_warmup_topk})
        return count(args, *rest, **options)

    training.num_floating_point_operations = count_by_step
