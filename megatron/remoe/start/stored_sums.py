"""Compare a checkpoint's tensors and objects with the CRC-32 sums that `torch.save` stores with them.

Every checkpoint has these sums, because PyTorch writes them. It does not check them when it loads.
"""

import io
import mmap
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, check_object, stored_object


def check_stored_sums(path: Path, places: Iterable[tuple[int, int]]) -> None:
    """Check parts of a file that `torch.save` wrote.

    Args:
        path: a file of a checkpoint.
        places: offset and length of each part, in bytes.

    Raises:
        BrokenCheckpointError: names the file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        for offset, length in places:
            before = offset % mmap.ALLOCATIONGRANULARITY
            try:
                with (
                    mmap.mmap(file.fileno(), before + length, offset=offset - before, access=mmap.ACCESS_READ) as part,
                    memoryview(part) as whole,
                    whole[before:] as content,
                ):
                    _check_records(content)
            except OSError:
                raise
            except Exception as error:  # a damaged archive can raise anything
                raise BrokenCheckpointError(
                    f"{path} has changed since it was saved ({error}, {length:,} bytes from {offset:,})"
                ) from error


def check_part(folder: Path, index: Metadata, part: int, parts: int) -> None:
    """Check one of several parts of a checkpoint's tensors and objects.

    Args:
        folder: `iter_...` of one iteration.
        index: from `read_index`.
        part: number of the part, from 0.
        parts: their number.

    Raises:
        BrokenCheckpointError: names the file or the object.
        OSError: a file cannot be read.
    """
    for key, entry in sorted(index.storage_data.items(), key=lambda item: str(item[0]))[part::parts]:
        check_stored_sums(folder / entry.relative_path, [(entry.offset, entry.length)])
        if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):
            check_object(key.fqn, stored_object(folder, entry))


def _check_records(content: memoryview) -> None:
    """Raise BadZipFile if a record of an archive does not match its sum."""
    archive = zipfile.ZipFile(_Window(content))
    # There are none with torch.serialization.set_crc32_options(False).
    has_sums = any(record.CRC for record in archive.infolist())
    if has_sums and (changed := archive.testzip()) is not None:
        raise zipfile.BadZipFile(changed)


class _Window(io.RawIOBase):
    """A file over bytes in memory, without a copy of all of them."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, len(self._content))[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        found = self._content[self._position : self._position + len(buffer)]
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)
