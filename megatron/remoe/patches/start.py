"""Start without a Makefile, and count FLOPs during a top-k warm-up."""

import importlib
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.datasets import utils
from megatron.training import training


def use_shipped_helpers() -> None:
    """Use the compiled data helpers of the wheel instead of running `make`.

    Megatron runs `make` at the start and exits if it fails. The released wheel contains the compiled helpers but no
    Makefile, so no training starts from it, with or without a GPU.
    """
    if (Path(utils.__file__).parent / "Makefile").exists():
        return
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    utils.compile_helpers = lambda: None


def count_warmup_flops() -> None:
    """Count a warm-up step with its own k, in the throughput and in the total that checkpoints keep."""
    count = training.num_floating_point_operations
    if hasattr(count, "__wrapped__"):
        return

    @wraps(count)
    def count_by_step(args: Any, *rest: Any, **options: Any) -> Any:
        if getattr(args, "moe_warmup_topk", None) and args.curr_iteration < args.moe_warmup_steps:
            args = SimpleNamespace(**vars(args) | {"moe_router_topk": args.moe_warmup_topk})
        return count(args, *rest, **options)

    training.num_floating_point_operations = count_by_step
