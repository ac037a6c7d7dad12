"""Count the events of a step: launches in the no-op CUDA, Python calls, waits and collectives."""

import collections
import ctypes
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
ALIASES = {"_all_gather_base": "all_gather_into_tensor", "_reduce_scatter_base": "reduce_scatter_tensor"}


class Launches:
    """The launches that the no-op CUDA has counted, by part of a step.

    Attributes:
        by_part: part → launches of each call; parts lie within one another.
        step: launches of the whole step.
    """

    def __init__(self) -> None:
        self.so_far: Callable[[], int] = ctypes.CDLL("libcuda.so.1").rehearsal_launches  # preloaded
        self.by_part: dict[str, list[int]] = {}
        self.step = 0
        self._is_counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the step inside the block."""
        before, self._is_counting = self.so_far(), True
        yield
        self.step, self._is_counting = self.so_far() - before, False

    def watch(
        self, owner: Any, method: str, part: str, continues: Callable[[Any], bool] = lambda _first: False
    ) -> None:
        """Start counting the calls of a class's method, or of a module's function.

        Args:
            owner, method: the class or module, and the name of its method or function.
            part: the name under which its launches are counted.
            continues: whether a call, by its first argument, belongs to the call before it.
        """
        real = getattr(owner, method)

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            before = self.so_far()
            result = real(*arguments, **options)
            if self._is_counting:
                calls = self.by_part.setdefault(part, [])
                so_far = calls.pop() if calls and continues(arguments[0]) else 0
                calls.append(so_far + self.so_far() - before)
            return result

        setattr(owner, method, watched)


class Collectives:
    """The calls of torch.distributed, by kind and group, with the bytes that a rank handles."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str, int, bool], list[int]] = {}  # kind, group, its size, within a node → bytes
        self.is_counting = False

    def watch(self, gpus_per_node: int) -> None:
        """Start counting. Call it before anything imports these functions by name."""
        for name in (*COLLECTIVES, *ALIASES):
            if real := getattr(torch.distributed, name, None):
                watched = self._watched(real, ALIASES.get(name, name), gpus_per_node)
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


class Frames:
    """The calls of Python functions, in all threads.

    Attributes:
        count: calls so far.
    """

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside the block."""
        monitoring = sys.monitoring
        tool, event = monitoring.PROFILER_ID, monitoring.events.PY_START
        monitoring.use_tool_id(tool, "rehearsal")
        monitoring.register_callback(tool, event, self._started)
        monitoring.set_events(tool, event)
        yield
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)

    def _started(self, _code: Any, _offset: int) -> None:
        self.count += 1


class Waits:
    """The places at which the host waits for the device, as PyTorch's sync-debug mode warns of them."""

    def __init__(self) -> None:
        self.places: collections.Counter[str] = collections.Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect waits inside the block."""
        show = warnings.showwarning

        def take(message: Any, *arguments: Any, **options: Any) -> None:
            if "called a synchronizing" in str(message):  # and not the first warning, of the mode itself
                self.places[_place()] += 1
            else:
                show(message, *arguments, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = take
            torch.cuda.set_sync_debug_mode("warn")
            yield
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
