"""Megatron's .bin/.idx format, written in one pass, with memory that does not grow with the number of documents.

.idx: "MMIDIDX\\0\\0", version 1 (uint64), code of the tokens' type (uint8), number of sequences (uint64), number of
document bounds (uint64); then per sequence its length in tokens (int32), per sequence its offset in bytes (int64), and
the document bounds (int64), counted in sequences. .bin: the tokens of all sequences. Everything is little-endian.
"""

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.remoe.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
LENGTHS_AT_ONCE = 1 << 20
TOKENS_AT_ONCE = 1 << 24


def token_type(vocabulary_size: int) -> np.dtype:
    """The type in which Megatron stores the tokens of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def bin_path(prefix: Path) -> Path:
    """Path of the tokens of the data set with this prefix."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Path of the index of the data set with this prefix."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes a data set beside its place; `publish` puts it there, and leaving the context removes what was not.

    An empty document has no sequence, only a document bound, as in Megatron-LM's tool.

    Raises:
        DataError: another process is writing the same data set.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.documents = self.tokens = self.sequences = 0
        aside = prefix.with_name(f".tmp-{prefix.name}")
        self.aside = aside
        self._tokens = _open_alone(bin_path(aside), prefix)
        self._lengths: BinaryIO = aside.with_name(aside.name + ".lengths").open("w+b")
        self._published = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Unlinked before closing: the lock goes with the closing, and the next writer must not find the file.
        Path(self._lengths.name).unlink(missing_ok=True)
        if not self._published:
            idx_path(self.aside).unlink(missing_ok=True)
            bin_path(self.aside).unlink(missing_ok=True)
        for file in (self._lengths, self._tokens):
            _close_quietly(file, failed=error is not None)

    def add(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> None:
        """Add documents.

        Args:
            ids: the documents' tokens, one after the other, of the writer's type; shape [sum(lengths)].
            lengths: number of tokens of each document; shape [documents].
        """
        self._tokens.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4").data)
        self.documents += len(lengths)
        self.sequences += int(np.count_nonzero(lengths))
        self.tokens += len(ids)

    def finish(self) -> None:
        """Write the index, and bring both files to the disk."""
        self._lengths.flush()
        with idx_path(self.aside).open("wb") as index:
            code = next(code for code, name in TYPES.items() if np.dtype(name) == self.dtype)
            index.write(HEADER.pack(MAGIC, VERSION, code, self.sequences, self.documents + 1))
            for lengths in self._all_lengths():
                index.write(lengths[lengths > 0].tobytes())
            offset = 0
            for lengths in self._all_lengths():
                ends = offset + self.dtype.itemsize * np.cumsum(lengths[lengths > 0], dtype="<i8")
                index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes() if len(ends) else b"")
                offset = int(ends[-1]) if len(ends) else offset
            index.write(bytes(8))
            sequence = 0
            for lengths in self._all_lengths():
                bounds = sequence + np.cumsum(lengths > 0, dtype="<i8")
                index.write(bounds.tobytes())
                sequence = int(bounds[-1])
            index.flush()
            os.fsync(index.fileno())
        self._tokens.flush()
        os.fsync(self._tokens.fileno())

    def publish(self) -> None:
        """Put the finished data set in its place."""
        idx_path(self.prefix).unlink(missing_ok=True)  # never an old index beside new tokens
        os.replace(bin_path(self.aside), bin_path(self.prefix))
        os.replace(idx_path(self.aside), idx_path(self.prefix))
        self._published = True

    def _all_lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(4 * LENGTHS_AT_ONCE):
            yield np.frombuffer(chunk, dtype="<i4")


def _open_alone(path: Path, prefix: Path) -> BinaryIO:
    """Open a file that this process alone may write, emptied; what a run that was killed left there is reused."""
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        alone = False
    except OSError:
        alone = True  # a file system without locks
    if not alone:
        file.close()
        raise DataError(
            f"Another run is writing {prefix}.bin. Wait for its end, or give another --output-prefix."
        ) from None
    file.truncate()
    return file


def _close_quietly(file: BinaryIO, failed: bool) -> None:
    try:
        file.close()
    except OSError:
        # The disk is full: the error under way says so already.
        if not failed:
            raise


class IndexedReader:
    """A data set on disk, mapped.

    Args:
        prefix: path of the .bin/.idx pair without suffix.
        thorough: look at every sequence; otherwise at the header and at the files' sizes, in a few reads. Longer files
            than needed pass then: some of Megatron's data sets keep more in them than text.

    Attributes:
        dtype: type of a token.
        lengths: number of tokens of each sequence; int32 `[sequences]`.
        pointers: where each starts in the .bin file, in bytes; int64 `[sequences]`.
        bounds: the first sequence of each document, and the number of sequences; int64 `[documents + 1]`.
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
                "tools/preprocess_data.py makes one."
            )
        self.dtype, sequences, bounds = _read_header(index)
        size = HEADER.size + 12 * sequences + 8 * bounds
        _check_size(index, size, thorough)
        data = np.memmap(index, mode="r")
        pointers_at, bounds_at = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        self.lengths: npt.NDArray[np.int32] = data[HEADER.size : pointers_at].view("<i4")
        self.pointers: npt.NDArray[np.int64] = data[pointers_at:bounds_at].view("<i8")
        self.bounds: npt.NDArray[np.int64] = data[bounds_at:size].view("<i8")
        if thorough:
            self._check(index)
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        _check_size(tokens, end, thorough)
        self.tokens = tokens.stat().st_size // self.dtype.itemsize

    @property
    def documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.bounds) - 1

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each document; shape [documents]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.bounds])

    def document(self, index: int) -> npt.NDArray[np.integer]:
        """The tokens of one document; shape [length of the document]."""
        first, last = int(self.bounds[index]), int(self.bounds[index + 1])
        if first == last:
            return np.empty(0, dtype=self.dtype)
        start = int(self.pointers[first]) // self.dtype.itemsize
        return self.read(start, int(np.sum(self.lengths[first:last], dtype=np.int64)))

    def read(self, start: int, count: int) -> npt.NDArray[np.integer]:
        """Tokens of the .bin file from a place on, fewer at its end; shape [count]."""
        # Mapped, all that is read would count as resident memory.
        return np.fromfile(bin_path(self.prefix), self.dtype, count, offset=start * self.dtype.itemsize)

    def largest_token(self) -> int:
        """The largest id; reads all tokens."""
        starts = range(0, self.tokens, TOKENS_AT_ONCE)
        return max((int(self.read(start, TOKENS_AT_ONCE).max()) for start in starts), default=-1)

    def _check(self, index: Path) -> None:
        if len(self.bounds) == 0 or self.bounds[0] != 0 or self.bounds[-1] != len(self.lengths):
            raise _corrupt(index, "its document bounds do not span its sequences")
        offset, at_once = 0, LENGTHS_AT_ONCE
        for i in range(0, len(self.lengths), at_once):
            lengths = self.lengths[i : i + at_once]
            if (lengths < 0).any():
                raise _corrupt(index, f"sequence {i + int(np.argmax(lengths < 0))} has a negative length")
            ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            wrong = self.pointers[i : i + at_once] != np.concatenate([[offset], ends[:-1]])
            if wrong.any():
                at = i + int(np.argmax(wrong))
                raise _corrupt(index, f"sequence {at} starts at byte {self.pointers[at]} of the .bin file, not where "
                               "the one before it ends")  # fmt: skip
            offset = int(ends[-1])
        for i in range(0, len(self.bounds) - 1, at_once):
            if (np.diff(self.bounds[i : i + at_once + 1]) < 0).any():
                raise _corrupt(index, "its document bounds are not in order")


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Type of a token, number of sequences, number of document bounds."""
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise _corrupt(path, f"{len(header)} bytes, fewer than the {HEADER.size} of a header")
    magic, version, code, sequences, bounds = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise _corrupt(path, f"it does not begin with the header of Megatron's index, version {VERSION}")
    if code not in TYPES:
        raise _corrupt(path, f"unknown code {code} of the tokens' type")
    return np.dtype(TYPES[code]), sequences, bounds


def _check_size(path: Path, expected: int, exactly: bool) -> None:
    size = path.stat().st_size
    if size < expected or (exactly and size > expected):
        raise _corrupt(path, f"it has {size:,} bytes instead of {expected:,}")


def _corrupt(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is truncated or corrupt: {why}. Copy the pair again, or make it anew with tools/preprocess_data.py."
    )
