"""Simulate one rank of many in one process: no other rank exists, and values read from the device are made up."""

import ctypes
import os
import random
from collections.abc import Callable
from typing import Any

import torch

_UNIQUE_ID = 128  # bytes of NCCL's identifier of a communicator
SPREAD = 0.1  # largest relative deviation of an expert's share from the mean


def join(rank: int, world: int, gpus_per_node: int) -> None:
    """Make torch.distributed act as if all ranks existed. Call it before Megatron is imported."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank % gpus_per_node), WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(gpus_per_node), MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend "fake"

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

    replacements = {
        "init_process_group": init_alone,
        "new_group": new_group_alone,
        "barrier": lambda *_, **__: None,
        "all_gather_object": all_gather_own,
        "gather_object": gather_own,
    }
    for name, function in replacements.items():
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
        # NCCL's watchdog looks here for failed ranks, and would wait for a failed rank's dump.
        return all(key in self._values for key in keys)

    def wait(self, *_arguments: Any) -> None:
        pass


class FakePairCounts:
    """Made-up counts that replace those that the host would read from routing maps.

    Attributes:
        share: active share of (token, expert) pairs, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._random = random.Random(1234)

    def install(self) -> None:
        """Replace the functions that read from the device. Call this after Megatron is imported."""
        from megatron.core.transformer.moe import token_dispatcher
        from megatron.remoe.layer import counting

        counting.read_pairs = self.counted(counting.read_pairs)
        token_dispatcher.maybe_move_tensor_to_cpu = self._moved(token_dispatcher.maybe_move_tensor_to_cpu)
        item, truth = torch.Tensor.item, torch.Tensor.__bool__

        def read(tensor: torch.Tensor) -> Any:
            """Return 1 for floats on the device, such as losses and norms: their memory is uninitialized."""
            value = item(tensor)
            return 1.0 if tensor.is_cuda and tensor.is_floating_point() else value

        def read_truth(tensor: torch.Tensor) -> bool:
            """Return False for every tensor on the device: its memory may hold bytes of an earlier copy."""
            return truth(tensor) and not tensor.is_cuda

        for name, function in {"item": read, "__bool__": read_truth}.items():
            setattr(torch.Tensor, name, function)

    def counted(self, real: Callable[..., tuple[torch.Tensor, int]]) -> Callable[..., tuple[torch.Tensor, int]]:
        """Wrap `read_pairs`: replace its counts by ones with the active share, nearly even over the experts."""

        def read_pairs(routing_map: torch.Tensor, parts: list[torch.Tensor], *how: Any) -> tuple[torch.Tensor, int]:
            pairs, _ = real(routing_map, parts, *how)
            for chunk, tokens in enumerate(len(part) for part in routing_map.tensor_split(len(parts))):
                for number in pairs[chunk]:
                    number.copy_(torch.tensor([self._draw_pairs(tokens) for _ in number]))
            return pairs, len(routing_map)

        return read_pairs

    def _draw_pairs(self, tokens: int) -> int:
        deviation = self._random.uniform(-SPREAD, SPREAD)
        return min(tokens, max(0, round(tokens * self.share * (1 + deviation))))

    def _moved(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function with which Megatron's own dispatchers read: it then returns the counts of an even load."""
        from megatron.training import get_args

        def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
            moved = real(tensor, as_numpy, record_stream)
            if not torch.is_tensor(tensor) or not tensor.is_cuda:
                return moved
            args = get_args()
            tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
            tokens //= args.tensor_model_parallel_size if args.sequence_parallel else 1
            pairs = int(tokens * args.num_experts * self.share)
            # A scalar: all pairs. A row: an even part in each entry. A table: the pairs of each rank for each expert.
            parts = (1, tensor.numel(), args.num_experts)[tensor.dim()]
            moved[...] = pairs // max(1, parts)
            return moved

        return move
