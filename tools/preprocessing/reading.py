"""Reads lines of text from files, compressed or not, and from standard input, in blocks of bounded size."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from megatron.remoe.data.errors import DataError

from .unpacking import DamagedDataError, compression_of, unpack

STANDARD_INPUT = "-"
BLOCK_BYTES = 2 << 20
LONGEST_LINE = 128 << 20


@dataclass(frozen=True)
class Block:
    """Whole lines of one input; `first_line` counts from 1."""

    source: str
    first_line: int
    data: bytes


@dataclass(frozen=True)
class Damage:
    """The place where an input's compressed data ends too early; its whole lines came before."""

    source: str
    line: int
    reason: str


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """The files that --input names, globs expanded and sorted; "-" is standard input.

    Raises:
        DataError: nothing matches, or a file cannot be read or unpacked.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if pattern == STANDARD_INPUT or os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise DataError(f"--input {pattern}: there is no such file, and as a pattern it matches none.")
        paths += matches
    for path in paths:
        if os.path.isdir(path):
            raise DataError(f"--input {path}: is a folder. Name its files, for example with '{path}/*.jsonl'.")
        if path != STANDARD_INPUT and os.path.isfile(path):  # from a pipe, what is read now would be lost
            try:
                with open(path, "rb") as file:
                    compression_of(path, file.read(4))
            except OSError as error:
                raise _unreadable(path, error) from error
    return paths


class InputReader:
    """Iterates over all inputs; `done_bytes` of `total_bytes` (as on disk; None if unknown) were read so far.

    Raises:
        DataError: an input cannot be read or unpacked, or has a line of absurd length.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        files = all(path != STANDARD_INPUT and os.path.isfile(path) for path in paths)
        self.total_bytes = sum(os.path.getsize(path) for path in paths) if files else None
        self._before = 0
        self._file: BufferedReader | None = None

    @property
    def done_bytes(self) -> int:
        """Bytes read so far: compressed ones where the input is compressed."""
        here = self._file.tell() if self.total_bytes is not None and self._file is not None else 0
        return self._before + here

    def __iter__(self) -> Iterator[Block | Damage]:
        for path in self._paths:
            source = "<standard input>" if path == STANDARD_INPUT else path
            try:
                with _open(path) as file:
                    self._file = file
                    yield from _blocks(source, path, file)
                    self._before += file.tell() if self.total_bytes is not None else 0
            except OSError as error:
                raise _unreadable(source, error) from error
            finally:
                self._file = None


def _open(path: str) -> BufferedReader:
    return os.fdopen(os.dup(sys.stdin.fileno()), "rb") if path == STANDARD_INPUT else Path(path).open("rb")


def _blocks(source: str, name: str, file: BufferedReader) -> Iterator[Block | Damage]:
    pieces: list[bytes] = []
    size, line = 0, 1
    damage = None
    contents = unpack(file, compression_of(name, file.peek(4)[:4]))
    while True:
        try:
            piece = next(contents, b"")
        except DamagedDataError as error:
            damage, piece = error, b""
        pieces.append(piece)
        size += len(piece)
        if piece and (size < BLOCK_BYTES or b"\n" not in piece):
            if size > LONGEST_LINE:
                raise DataError(
                    f"{source}, line {line + b''.join(pieces).count(b'\n')}: is longer than {LONGEST_LINE >> 20} MiB. "
                    "Is this a .jsonl file, with one document a line?"
                )
            continue
        data = b"".join(pieces)
        end = data.rfind(b"\n") + 1 if piece or damage else len(data)
        if end:
            yield Block(source, line, data[:end])
            line += data.count(b"\n", 0, end)
        if not piece:
            break
        pieces, size = [data[end:]], len(data) - end
    if damage is not None:
        yield Damage(source, line, str(damage))


def _unreadable(source: str, error: OSError) -> DataError:
    return DataError(f"--input {source}: cannot be read ({error.strerror or error}).")
