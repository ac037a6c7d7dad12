"""Count the events of a step: Python calls, waits and collectives."""

import collections
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

# torch.distributed's functions: which argument's bytes each rank handles, by position or name.
COLLECTIVES = {
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input"),
    "all_to_all_single": (1, "input"),
    "isend": (0, "tensor"),
    "irecv": (0, "tensor"),
}


class Collectives:
    """The calls of torch.distributed, by kind and group, with the bytes that a rank handles."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str, int, bool], list[int]] = {}  # kind, group, its size, within a node → bytes
        self.is_counting = False

    def watch(self, gpus_per_node: int) -> None:
        """Start counting. Call it before anything imports these functions by name."""
        for name in COLLECTIVES:
            watched = self._watched(getattr(torch.distributed, name), name, gpus_per_node)
            setattr(torch.distributed, name, watched)
            setattr(torch.distributed.distributed_c10d, name, watched)

    def list_calls(self) -> list[dict[str, Any]]:
        """Return the calls by kind and group: their number, "times", and their bytes in all."""
        names = ("kind", "group", "ranks", "within_node")
        return [
            dict(zip(names, call, strict=True)) | {"times": len(sizes), "bytes": sum(sizes)}
            for call, sizes in self.calls.items()
        ]

    def _watched(self, real: Callable[..., Any], kind: str, gpus_per_node: int) -> Callable[..., Any]:
        position, keyword = COLLECTIVES[kind]

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            tensor = arguments[position] if len(arguments) > position else options.get(keyword)
            if self.is_counting and torch.is_tensor(tensor) and tensor.is_cuda:
                groups = [one for one in arguments if isinstance(one, torch.distributed.ProcessGroup)]
                group = next(iter(groups), options.get("group")) or torch.distributed.group.WORLD
                assert group is not None
                ranks = torch.distributed.get_process_group_ranks(group)
                within = len({rank // gpus_per_node for rank in ranks}) == 1
                name = group.group_desc.removesuffix("_GROUP").lower().replace("_", " ")
                self.calls.setdefault((kind, name, len(ranks), within), []).append(tensor.nbytes)
            return real(*arguments, **options)

        return watched


@contextmanager
def counting_frames() -> Iterator[collections.Counter[str]]:
    """Count the calls of Python functions inside the block, in all threads; yield a counter with "calls"."""
    monitoring, counter = sys.monitoring, collections.Counter[str]()
    tool, event = monitoring.PROFILER_ID, monitoring.events.PY_START

    def started(_code: Any, _offset: int) -> None:
        counter["calls"] += 1

    monitoring.use_tool_id(tool, "rehearsal")
    monitoring.register_callback(tool, event, started)
    monitoring.set_events(tool, event)
    yield counter
    monitoring.set_events(tool, 0)
    monitoring.free_tool_id(tool)


@contextmanager
def watching_waits() -> Iterator[collections.Counter[str]]:
    """Count the places inside the block at which the host waits for the device, by PyTorch's sync-debug warnings."""
    show, places = warnings.showwarning, collections.Counter[str]()

    def take(message: Any, *arguments: Any, **options: Any) -> None:
        if "called a synchronizing" in str(message):  # and not the first warning, of the mode itself
            places[_place()] += 1
        else:
            show(message, *arguments, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = take
        torch.cuda.set_sync_debug_mode("warn")
        yield places
        torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """Return file and line of the innermost frames of Megatron and of this project that led here; calls nothing."""
    here, folder = os.path.dirname(__file__), f"{os.sep}megatron{os.sep}"
    frame: FrameType | None = sys._getframe(1)
    named: list[str] = []
    while frame is not None and len(named) < 2:
        file = frame.f_code.co_filename
        if folder in file and not file.startswith(here):
            named.append(f"megatron/{file.rsplit('megatron' + os.sep, 1)[1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(named) or "outside of Megatron"
