"""Read lines of text from files, compressed or not, in blocks."""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.remoe.files.errors import DataError

try:
    from compression import zstd  # Python 3.14
except ImportError:
    import backports.zstd as zstd

BLOCK_BYTES = 2 << 20
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPED_MAGIC = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; pzstd begins with such a frame
ZSTD_LARGEST_WINDOW_LOG = 31


@dataclass(frozen=True)
class Block:
    """Lines of one input; `first_line` counts from 1, `done_bytes` is how much of all inputs was read."""

    source: str
    first_line: int
    lines: list[bytes]
    done_bytes: int


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Return the files that --input names, with patterns expanded and sorted.

    Raises:
        DataError: nothing matches, or a folder does.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise DataError(f"--input {pattern}: there is no such file, and as a pattern it matches none.")
        paths += matches
    for path in paths:
        if os.path.isdir(path):
            raise DataError(f"--input {path}: is a folder. Name its files, for example with '{path}/*.jsonl'.")
    return paths


def read_blocks(paths: Sequence[str]) -> Iterator[Block]:
    """Yield the lines of all inputs in blocks.

    Raises:
        DataError: an input cannot be read, or its compressed data is broken.
    """
    before = 0
    for path in paths:
        first = 1
        try:
            with Path(path).open("rb") as file:
                contents = _unpacked(file)
                while lines := contents.readlines(BLOCK_BYTES):
                    yield Block(path, first, lines, before + file.tell())
                    first += len(lines)
                before += file.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as error:
            place = f"{path}, after line {first - 1}"
            raise DataError(f"{place}: compressed data broken ({error}). Copy the file again.") from error
        except OSError as error:
            raise DataError(f"--input {path}: cannot be read ({error.strerror or error}).") from error


def _unpacked(file: io.BufferedReader) -> io.BufferedIOBase:
    """Return the contents of a file, decompressed if it starts like gzip or zstd."""
    start = file.peek(4)[:4]
    if start.startswith(GZIP_MAGIC):
        return gzip.open(file)
    if start.startswith(ZSTD_MAGIC) or (start[1:4] == ZSTD_SKIPPED_MAGIC and start[0] >> 4 == 5):
        return zstd.open(file, options={zstd.DecompressionParameter.window_log_max: ZSTD_LARGEST_WINDOW_LOG})
    return file
