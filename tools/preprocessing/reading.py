"""Read lines of text from files, compressed or not, and from standard input, in blocks of bounded size."""

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
    """Whole lines of one input; `first_line` counts from 1.

    `damage` says why the compressed data ends after them, if it does, and `done_bytes` how much of all inputs was read.
    """

    source: str
    first_line: int
    data: bytes
    done_bytes: int
    damage: str = ""


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Return the files that --input names, with patterns expanded and sorted; "-" is standard input.

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
        if path != STANDARD_INPUT and os.path.isfile(path):  # a pipe would lose what is read here
            try:
                with open(path, "rb") as file:
                    compression_of(path, file.read(4))
            except OSError as error:
                raise _unreadable(path, error) from error
    return paths


def size_of(paths: Sequence[str]) -> int | None:
    """Return the bytes of all inputs on disk; None if one is not a file."""
    is_known = all(path != STANDARD_INPUT and os.path.isfile(path) for path in paths)
    return sum(os.path.getsize(path) for path in paths) if is_known else None


def read_blocks(paths: Sequence[str]) -> Iterator[Block]:
    """Yield the lines of all inputs in blocks.

    Raises:
        DataError: an input cannot be read or unpacked, or has a line of absurd length.
    """
    before = 0
    for path in paths:
        source = "<standard input>" if path == STANDARD_INPUT else path
        try:
            with os.fdopen(os.dup(sys.stdin.fileno()), "rb") if source != path else Path(path).open("rb") as file:
                yield from _blocks(source, path, file, before)
                before += file.tell() if file.seekable() else 0
        except OSError as error:
            raise _unreadable(source, error) from error


def _blocks(source: str, name: str, file: BufferedReader, before: int) -> Iterator[Block]:
    pieces: list[bytes] = []
    size, line, damage = 0, 1, ""
    contents = unpack(file, compression_of(name, file.peek(4)[:4]))
    while True:
        try:
            piece = next(contents, b"")
        except DamagedDataError as error:
            damage, piece = str(error), b""
        pieces.append(piece)
        size += len(piece)
        if piece and (size < BLOCK_BYTES or b"\n" not in piece):
            if size > LONGEST_LINE:
                raise DataError(
                    f"{source}, line {line + b''.join(pieces).count(b'\n')}: is longer than {LONGEST_LINE >> 20} MiB. "
                    "Is this a .jsonl file, with one document per line?"
                )
            continue
        data = b"".join(pieces)
        end = data.rfind(b"\n") + 1 if piece or damage else len(data)
        if end or damage:
            yield Block(source, line, data[:end], before + (file.tell() if file.seekable() else 0), damage)
            line += data.count(b"\n", 0, end)
        if not piece:
            return
        pieces, size = [data[end:]], len(data) - end


def _unreadable(source: str, error: OSError) -> DataError:
    return DataError(f"--input {source}: cannot be read ({error.strerror or error}).")
