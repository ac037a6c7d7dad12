"""Reads parts of the tensors in a distributed checkpoint, so that a large model never is in memory as a whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.remoe.preflight.checkpoint_files import read_index


@dataclass(frozen=True)
class Part:
    """A part of a stored tensor.

    Attributes:
        key: of the tensor.
        offsets: where the part begins, in each dimension.
        data: takes it, in its own type.
    """

    key: str
    offsets: list[int]
    data: torch.Tensor


class _Parts(LoadPlanner):
    """Tells PyTorch's reader where what it reads goes."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = {part.key: part for part in parts}

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.metadata = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, part in self.parts.items():
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), part.data.shape)
            items += create_read_items_for_chunk_list(key, self.metadata[key], [chunk])  # type: ignore[arg-type]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.parts[read_item.dest_index.fqn].data
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dimension, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def read_parts(folder: Path, parts: list[Part]) -> None:
    """Fill the parts' `data`.

    Args:
        folder: of one iteration.
        parts: no two of one tensor.

    Raises:
        BrokenCheckpointError: the index is missing or cannot be read. What PyTorch raises where a file is damaged.
    """
    reader, planner, index = FileSystemReader(folder), _Parts(parts), read_index(folder)
    planner.set_up_planner({}, index)
    reader.set_up_storage_reader(index, is_coordinator=True)
    reader.read_data(reader.prepare_local_plan(planner.create_local_plan()), planner).wait()
