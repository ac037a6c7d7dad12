"""Read and write Megatron's .bin/.idx format.

.idx: "MMIDIDX\\0\\0", version 1 (uint64), code of the token type (uint8), number of sequences (uint64), number of
document bounds (uint64). Then the length of each sequence in tokens (int32), the offset of each sequence in bytes
(int64), and the document bounds, counted in sequences (int64). .bin: the tokens of all sequences. Little-endian.
"""

import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.remoe.files.errors import DataError
from megatron.remoe.files.files import take_lock

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
ENTRIES_AT_ONCE = 1 << 20
TOKENS_AT_ONCE = 1 << 24


def token_type(vocabulary_size: int) -> np.dtype:
    """Return the type in which Megatron stores the tokens of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return the path of a data set's tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the path of a data set's index."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Write a data set under a temporary name. `publish` renames it. Leaving the context without `publish` removes it.

    Memory grows by 4 bytes per document. An empty document has a bound but no sequence, as in Megatron-LM's tool.

    Raises:
        DataError: another process is writing the same data set.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.documents = self.tokens = 0
        self.aside = prefix.with_name(f".tmp-{prefix.name}")
        self._file = _open_alone(bin_path(self.aside), prefix)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._published = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # Unlink before closing: closing releases the lock, and the next writer must not find the file.
        if not self._published:
            idx_path(self.aside).unlink(missing_ok=True)
            bin_path(self.aside).unlink(missing_ok=True)
        # On a full disk closing fails again; `finish` has flushed everything that counts.
        with suppress(OSError):
            self._file.close()

    def add(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        """Add documents.

        Args:
            ids: the documents' tokens, concatenated; shape [sum(lengths)].
            lengths: number of tokens of each document; shape [documents].
        """
        self._file.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._lengths.append(np.array(lengths, dtype=np.int32))
        self.documents += len(lengths)
        self.tokens += len(ids)

    def finish(self) -> None:
        """Write the index and flush both files to the disk."""
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        filled = lengths[lengths > 0]
        code = next(code for code, name in TYPES.items() if np.dtype(name) == self.dtype)
        with idx_path(self.aside).open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, code, len(filled), len(lengths) + 1))
            index.write(filled.astype("<i4").data)
            offsets = np.cumsum(filled, dtype="<i8") - filled
            index.write((offsets * self.dtype.itemsize).data)
            index.write(bytes(8) + np.cumsum(lengths > 0, dtype="<i8").tobytes())
            for file in index, self._file:
                file.flush()
                os.fsync(file.fileno())

    def publish(self) -> None:
        """Rename the finished data set, and remove Megatron's index cache of an older one."""
        idx_path(self.prefix).unlink(missing_ok=True)  # an old index must never be next to new tokens
        shutil.rmtree(self.prefix / "cache", ignore_errors=True)
        os.replace(bin_path(self.aside), bin_path(self.prefix))
        os.replace(idx_path(self.aside), idx_path(self.prefix))
        self._published = True


def _open_alone(path: Path, prefix: Path) -> BinaryIO:
    """Open, lock and empty a file, which a killed run may have left."""
    file = path.open("ab")
    # Another run may have published the file between opening and locking.
    if not (take_lock(file) and path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        file.close()
        raise DataError(f"Another run is writing {prefix}.bin. Wait for it, or give a different --output-prefix.")
    file.truncate(0)
    return file


class IndexedReader:
    """A data set on disk, memory-mapped.

    Args:
        prefix: path of the .bin/.idx pair without suffix.
        thorough: check every entry of the index (about 2 s per 100 million sequences), not only header and sizes.

    Attributes:
        dtype: type of a token.
        lengths: number of tokens of each sequence; int32 `[sequences]`.
        pointers: offset of each sequence in the .bin file, in bytes; int64 `[sequences]`.
        bounds: first sequence of each document, and the number of sequences; int64 `[documents + 1]`.
        tokens: number of tokens in the .bin file.

    Raises:
        DataError: a file is missing, truncated or corrupt; the message says which and why.
        OSError: a file cannot be read.
    """

    def __init__(self, prefix: Path, thorough: bool = True) -> None:
        self.prefix = prefix
        index, tokens = idx_path(prefix), bin_path(prefix)
        if missing := [str(path) for path in (index, tokens) if not path.is_file()]:
            raise DataError(
                f"there is no {' and no '.join(missing)}. Give the prefix of a .bin/.idx pair, without suffix; "
                "remoe preprocess makes one.",
                "REMOE-E301",
            )
        self.dtype, sequences, bounds = _read_header(index)
        pointers_at, bounds_at = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        size = bounds_at + 8 * bounds
        # Multimodal data sets end with a byte per sequence.
        if bounds == 0 or index.stat().st_size not in (size, size + sequences):
            raise _corrupt(index, f"it has {index.stat().st_size:,} bytes instead of {size:,}")
        data = np.memmap(index, mode="r")
        self.lengths: npt.NDArray[np.int32] = data[HEADER.size : pointers_at].view("<i4")
        self.pointers: npt.NDArray[np.int64] = data[pointers_at:bounds_at].view("<i8")
        self.bounds: npt.NDArray[np.int64] = data[bounds_at:size].view("<i8")
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if thorough:
            self._check_entries(index)
        if tokens.stat().st_size != end:
            raise _corrupt(tokens, f"it has {tokens.stat().st_size:,} bytes instead of {end:,}")
        self.tokens = end // self.dtype.itemsize

    @property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.bounds) - 1

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document; shape [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.bounds])

    def document(self, index: int) -> npt.NDArray[np.integer]:
        """Return the tokens of one document; shape [length of the document]."""
        first, last = int(self.bounds[index]), int(self.bounds[index + 1])
        if first == last:
            return np.empty(0, dtype=self.dtype)
        start = int(self.pointers[first]) // self.dtype.itemsize
        return self.read(start, int(np.sum(self.lengths[first:last], dtype=np.int64)))

    def read(self, start: int, count: int) -> npt.NDArray[np.integer]:
        """Return `count` tokens of the .bin file from `start` on, fewer at its end."""
        # A memory map would count everything that is read as resident memory.
        return np.fromfile(bin_path(self.prefix), self.dtype, count, offset=start * self.dtype.itemsize)

    def largest_token(self) -> int:
        """Return the largest token id, or -1 without tokens. This reads all tokens."""
        starts = range(0, self.tokens, TOKENS_AT_ONCE)
        return max((int(self.read(start, TOKENS_AT_ONCE).max()) for start in starts), default=-1)

    def _check_entries(self, index: Path) -> None:
        """Check that each sequence starts where the one before ends, and that document bounds ascend."""
        offset = 0
        for i in range(0, len(self.lengths), ENTRIES_AT_ONCE):
            here = slice(i, i + ENTRIES_AT_ONCE)
            sizes = self.lengths[here] * np.int64(self.dtype.itemsize)
            ends = np.cumsum(sizes)
            ends += offset
            wrong = (sizes < 0) | (self.pointers[here] != ends - sizes)
            if wrong.any():
                raise _corrupt(index, f"sequence {i + int(np.argmax(wrong))}: length and offset are inconsistent")
            offset = int(ends[-1])
        steps = range(0, len(self.bounds), ENTRIES_AT_ONCE)
        ordered = all((np.diff(self.bounds[i : i + ENTRIES_AT_ONCE + 1]) >= 0).all() for i in steps)
        if self.bounds[0] != 0 or self.bounds[-1] != len(self.lengths) or not ordered:
            raise _corrupt(index, "its document bounds do not ascend from 0 to the number of sequences")


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return the token type, the number of sequences and the number of document bounds."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise _corrupt(path, f"it has {len(header)} bytes, fewer than the {HEADER.size} of a header")
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION or code not in TYPES:
        raise _corrupt(path, f"it does not begin with the header of Megatron's index, version {VERSION}")
    return np.dtype(TYPES[code]), sequences, bounds


def _corrupt(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is truncated or corrupt: {why}. Copy the pair again, or make it again with remoe preprocess.",
        "REMOE-E302",
    )
