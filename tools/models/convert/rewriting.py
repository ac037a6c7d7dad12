"""Read the pieces of a torch_dist checkpoint one by one, and write another one from pieces."""

import io
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.remoe.start.checkpoint_files import CONFIG, RELEASE, TRACKER, stored_object

from ..checkpoints import new_folder, reading

# The name of an object that is stored in parts.
OBJECT = re.compile(r"(?P<key>.+)/shard_(?P<offset>[\d.]+)_(?P<shape>[\d.]+)")

type Place = tuple[int, ...]
type Piece = tuple[str, Place, Place, torch.Tensor]  # key, shape of the whole tensor, offset of the piece, the piece


class Writer:
    """Write one file of a torch_dist checkpoint and its index, piece by piece."""

    def __init__(self, folder: Path, file: BinaryIO) -> None:
        self.folder, self.file = folder, file
        self.stored: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}

    def add_object(self, key: str, content: bytes) -> None:
        """Write what `encoded` returns for an object."""
        self.stored[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), content)

    def add_tensor(self, key: str, shape: Place, offset: Place, tensor: torch.Tensor) -> None:
        """Write the piece at `offset` of the tensor `key` of that `shape`."""
        if key not in self.stored:
            properties = TensorProperties.create_from_tensor(tensor)
            self.stored[key] = TensorStorageMetadata(properties, torch.Size(shape), [])
        chunk = ChunkStorageMetadata(torch.Size(offset), tensor.shape)
        self.stored[key].chunks.append(chunk)
        # A view would be stored with all the memory that it looks into.
        self._write(MetadataIndex(key, chunk.offsets), encoded(tensor.clone(memory_format=torch.contiguous_format)))

    def write_index(self) -> None:
        """Write the index. The checkpoint is complete with it."""
        index = Metadata(self.stored, planner_data=None, storage_data=self.places)
        (self.folder / ".metadata").write_bytes(pickle.dumps(index))

    def _write(self, piece: MetadataIndex, content: bytes) -> None:
        name = Path(self.file.name).name
        self.places[piece] = _StorageInfo(relative_path=name, offset=self.file.tell(), length=len(content))
        self.file.write(content)


@contextmanager
def rewritten(source: Path, output: Path, state: dict[str, Any]) -> Iterator[Writer]:
    """Yield a writer for a checkpoint of the same iteration; the folder appears when the block ends.

    `state` has Megatron's settings and counters.

    Raises:
        ConversionError: it cannot be written, for instance because the disk is full.
    """
    size = sum(file.stat().st_size for file in source.rglob("*"))
    with new_folder(output, size) as aside:
        folder = aside / source.name
        folder.mkdir()
        with (folder / "__0_0.distcp").open("wb") as file:
            writer = Writer(folder, file)
            yield writer
            writer.add_object("common_state/shard_0_1", encoded([state]))
            writer.write_index()
        (folder / CONFIG).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
        tracked = RELEASE if folder.name == RELEASE else str(int(folder.name.removeprefix("iter_")))
        (aside / TRACKER).write_text(tracked, encoding="utf-8")


def read_tensor(folder: Path, index: Metadata, key: str, offset: torch.Size) -> torch.Tensor:
    """Read one stored piece of a tensor."""
    return torch.load(stored_object(folder, index.storage_data[MetadataIndex(key, offset)]), weights_only=True)


def objects(folder: Path, index: Metadata) -> Iterator[tuple[str, bytes]]:
    """Yield the stored objects except for the settings."""
    for key, kind in index.state_dict_metadata.items():
        if isinstance(kind, BytesStorageMetadata) and not key.startswith("common_state/"):
            yield key, stored_object(folder, index.storage_data[MetadataIndex(key)]).getvalue()


def tensors(folder: Path, index: Metadata) -> Iterator[Piece]:
    """Yield the stored pieces of all tensors."""
    for key, kind in index.state_dict_metadata.items():
        if isinstance(kind, TensorStorageMetadata):
            for chunk in kind.chunks:
                yield key, tuple(kind.size), tuple(chunk.offsets), read_tensor(folder, index, key, chunk.offsets)


def read_each[T](folder: Path, items: Iterable[T]) -> Iterator[T]:
    """Yield items from a checkpoint; keep read errors apart from the writer's.

    Raises:
        ConversionError: `folder` cannot be read.
    """
    iterator = iter(items)
    while True:
        with reading(folder):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def encoded(value: object) -> bytes:
    """Return the bytes that PyTorch stores for a tensor or an object."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
