"""What is counted in a rehearsal: launches by the CUDA that does nothing, waits and collectives by PyTorch."""

import collections
import ctypes
import functools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_STUB = "libcuda.so.1"  # preloaded
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


class Events:
    """The counts of the CUDA that does nothing."""

    def __init__(self) -> None:
        self._stub = ctypes.CDLL(_STUB)
        self._stub.rehearsal_counts.restype = ctypes.c_size_t
        self._stub.rehearsal_launches.restype = ctypes.c_long
        self.are_counted = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count anew in here."""
        self._stub.rehearsal_count(1)
        self.are_counted = True
        try:
            yield
        finally:
            self._stub.rehearsal_count(0)
            self.are_counted = False

    @property
    def launches(self) -> int:
        """Kernels, products, collectives, fills and copies so far."""
        return self._stub.rehearsal_launches()

    def counts(self) -> dict[str, collections.Counter[str]]:
        """Kind ("launch", "copy", "wait", "other") → name → number."""
        buffer = ctypes.create_string_buffer(self._stub.rehearsal_counts(None, 0))
        self._stub.rehearsal_counts(buffer, len(buffer))
        found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for line in buffer.value.decode(errors="replace").splitlines():
            number, kind, name = line.split("\t", 2)
            found[kind][name] += int(number)
        return found


class Parts:
    """Launches by part of a step: functions that are called in it, one within another."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self.found: dict[str, list[int]] = {}  # name → launches of each call

    def watch(
        self, owner: Any, method: str, name: str, continues: Callable[[Any], bool] = lambda _first: False
    ) -> None:
        """Count in this method of a class, or function of a module, from now on.

        Args:
            owner, method: where it is.
            name: of the part.
            continues: whether a call, by its first argument, belongs to the one before it.
        """
        real = getattr(owner, method)

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            before = self._events.launches
            result = real(*arguments, **options)
            if self._events.are_counted:
                calls = self.found.setdefault(name, [])
                so_far = calls.pop() if calls and continues(arguments[0]) else 0
                calls.append(so_far + self._events.launches - before)
            return result

        setattr(owner, method, watched)


class Collectives:
    """Calls of torch.distributed, by kind and group, with the bytes that a rank handles."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int, bool], list[int]] = {}  # kind, group, its size, within a node → bytes
        self.is_counting = False

    def watch(self, gpus_per_node: int) -> None:
        """To be called before anything imports these functions by name."""
        for name in (*COLLECTIVES, *ALIASES):
            if real := getattr(torch.distributed, name, None):
                watched = self._watched(real, ALIASES.get(name, name), gpus_per_node)
                setattr(torch.distributed, name, watched)
                setattr(torch.distributed.distributed_c10d, name, watched)

    def _watched(self, real: Callable[..., Any], kind: str, gpus_per_node: int) -> Callable[..., Any]:
        position, keyword = COLLECTIVES[kind]

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            tensor = arguments[position] if len(arguments) > position else options.get(keyword)
            if self.is_counting and torch.is_tensor(tensor) and tensor.is_cuda:
                group = next(
                    (a for a in arguments if isinstance(a, torch.distributed.ProcessGroup)), options.get("group")
                )
                group = group or torch.distributed.group.WORLD
                assert group is not None
                ranks = torch.distributed.get_process_group_ranks(group)
                within = len({rank // gpus_per_node for rank in ranks}) == 1
                name = group.group_desc.removesuffix("_GROUP").lower().replace("_", " ")
                self.found.setdefault((kind, name, len(ranks), within), []).append(tensor.nbytes)
            return real(*arguments, **options)

        return watched


class Waits:
    """Places at which the host waits for the device, as PyTorch's sync-debug mode tells them."""

    def __init__(self) -> None:
        self.found: collections.Counter[str] = collections.Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect in here."""
        show = warnings.showwarning

        def take(message: Any, *arguments: Any, **options: Any) -> None:
            if "synchroniz" in str(message):
                self.found[_place()] += 1
            else:
                show(message, *arguments, **options)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = take
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    """File and line of the innermost frames of Megatron and of this project that led here."""
    here = os.path.dirname(__file__)
    frames = [
        frame
        for frame in traceback.extract_stack()
        if f"{os.sep}megatron{os.sep}" in frame.filename and not frame.filename.startswith(here)
    ]
    named = [f"megatron/{frame.filename.rsplit('megatron' + os.sep, 1)[1]}:{frame.lineno}" for frame in frames]
    return " < ".join(reversed(named[-2:])) or "outside of Megatron"
