"""Read lines from files, compressed or not, in blocks; and extract their texts."""

import glob
import gzip
import io
import json
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
CHARACTERS_SHOWN = 80
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPED_MAGIC = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; pzstd begins with such a frame
ZSTD_LARGEST_WINDOW_LOG = 31


@dataclass(frozen=True)
class Block:
    """Lines of one input; `first_line` counts from 1, and `done_bytes` is the number of bytes read from all inputs."""

    source: str
    first_line: int
    lines: list[bytes]
    done_bytes: int


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Return the files that --input names, with patterns expanded and sorted.

    Raises:
        DataError: nothing matches.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not matches:
            raise DataError(f"--input {pattern}: there is no such file, and as a pattern it matches none.")
        paths += matches
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


def parse_documents(block: Block, keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of a block's lines, by key.

    Args:
        block: lines.
        keys: names of the JSON fields that hold text.

    Raises:
        DataError: a line cannot be read, or has no text at a key.
    """
    documents: dict[str, list[str]] = {key: [] for key in keys}
    for number, line in enumerate(block.lines, start=block.first_line):
        try:
            texts = _read_texts(line, keys)
        except (ValueError, RecursionError) as error:
            start = line[:CHARACTERS_SHOWN].decode("utf-8", errors="backslashreplace").rstrip("\n")
            raise DataError(
                f"{block.source}, line {number}: cannot be read ({str(error)[:200]}): {start!r}. Correct or remove it."
            ) from None
        for key, text in zip(keys, texts, strict=True):
            documents[key].append(text)
    return documents


def _read_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """Return the texts of a line.

    Raises:
        ValueError, RecursionError: the line is not UTF-8 or JSON, or a key has no text.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"each line must be a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("each line must be a JSON object")
    for key in keys:
        if not isinstance(record.get(key), str):
            given = "it is not a string" if key in record else f"keys: {', '.join(map(repr, record)) or 'none'}"
            raise ValueError(f"no text at the key {key!r}; {given}")
        record[key].encode()  # fails for a lone surrogate from an escape, which no tokenizer accepts
    return [record[key] for key in keys]
