"""Let one process simulate one rank of many, without waiting for the others."""

import ctypes
import os
from typing import Any

import torch

_UNIQUE_ID = 128  # bytes by which NCCL's ranks find each other


def join(rank: int, world: int, gpus_per_node: int) -> None:
    """Make torch.distributed believe that all ranks exist. Call it before Megatron is imported."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank % gpus_per_node), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(gpus_per_node), MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # has the backend "fake"

    distributed, stub = torch.distributed, ctypes.CDLL("libcuda.so.1")
    store = _StoreOfOne()
    init_process_group, new_group = distributed.init_process_group, distributed.new_group

    def init_alone(*arguments: Any, **options: Any) -> Any:
        options.pop("init_method", None)
        return init_process_group(*arguments, **options | {"store": store, "rank": rank, "world_size": world})

    def new_group_alone(ranks: Any = None, *arguments: Any, **options: Any) -> Any:
        members = list(range(world)) if ranks is None else list(ranks)
        stub.rehearsal_next_communicator(len(members), members.index(rank) if rank in members else -1)
        if options.get("backend") == "gloo":
            options["backend"] = "fake"
        return new_group(ranks, *arguments, **options)

    def all_gather_own(object_list: list[Any], obj: Any, *_: Any, **__: Any) -> None:
        object_list[:] = [obj] * len(object_list)

    def gather_own(obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **__: Any) -> None:
        all_gather_own(object_gather_list or [], obj)

    alone = {
        "init_process_group": init_alone,
        "new_group": new_group_alone,
        "barrier": lambda *_, **__: None,
        "all_gather_object": all_gather_own,
        "gather_object": gather_own,
    }
    for name, function in alone.items():
        setattr(distributed, name, function)
        setattr(distributed.distributed_c10d, name, function)


class _StoreOfOne(torch.distributed.Store):
    """A store that returns zeros for the values of other ranks."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        return self._values.get(key, bytes(_UNIQUE_ID))

    def add(self, key: str, amount: int) -> int:
        self.set(key, str(int(self._values.get(key, b"0")) + amount))
        return int(self._values[key])

    def check(self, keys: list[str]) -> bool:
        # NCCL's watchdog looks here for the news that a rank has failed, and then waits for that rank's dump.
        return all(key in self._values for key in keys)

    def wait(self, *_arguments: Any) -> None:
        pass

    def set_timeout(self, _timeout: Any) -> None:
        pass
