"""Unpack gzip and zstd data piece by piece, and notice when it ends too early."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Any

from megatron.remoe.data.errors import DataError

PIECE_BYTES = 1 << 18
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPED_MAGIC = b"\x2a\x4d\x18"  # after a byte 0x50 to 0x5f; pzstd begins with such a frame
ZSTD_PACKED_BYTES = 1 << 14  # unpacked in one step: zstd's best ratio keeps the result small
ZSTD_LARGEST_WINDOW_LOG = 31


class DamagedDataError(Exception):
    """Compressed data that ends too early or cannot be unpacked."""


def compression_of(name: str, start: bytes) -> str | None:
    """Return how an input is compressed, by its first bytes: "gzip", "zstd" or None.

    Raises:
        DataError: the name says otherwise, or nothing here can unpack it.
    """
    if start.startswith(GZIP_MAGIC):
        return "gzip"
    if start.startswith(ZSTD_MAGIC) or (start[1:4] == ZSTD_SKIPPED_MAGIC and start[0] >> 4 == 5):
        try:
            _zstd()
        except ImportError as error:
            raise DataError(
                f"--input {name}: is zstd data, which this Python cannot unpack. "
                "Install the package zstandard (pip install zstandard), or pipe it in: zstd -dc FILE | ... --input -"
            ) from error
        return "zstd"
    if name.endswith((".gz", ".zst")):
        kind = "gzip" if name.endswith(".gz") else "zstd"
        raise DataError(f"--input {name}: is not {kind} data, as its name says. Copy it again, or rename it.")
    return None


def unpack(file: BufferedReader, compression: str | None) -> Iterator[bytes]:
    """Yield the contents of a file in pieces of bounded size.

    Raises:
        DamagedDataError: after all that could be unpacked.
    """
    if compression == "gzip":
        return _from_gzip(file)
    if compression == "zstd":
        return _from_zstd(file)
    return iter(lambda: file.read(PIECE_BYTES), b"")


def _from_gzip(file: BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file, mode="rb") as unpacked:
        try:
            # read1() returns the data before the damage; read() would lose it.
            while piece := unpacked.read1(PIECE_BYTES):
                yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedDataError(str(error)) from error


def _from_zstd(file: BufferedReader) -> Iterator[bytes]:
    # Frame by frame: a reader of the whole stream accepts a truncated file.
    start_frame, zstd_error = _zstd()
    frame = None
    try:
        while packed := file.read(ZSTD_PACKED_BYTES):
            while packed:
                frame = frame or start_frame()
                if piece := frame.decompress(packed):
                    yield piece
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstd_error as error:
        raise DamagedDataError(str(error)) from error
    if frame is not None:
        raise DamagedDataError("the file ends before the data does")


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    """Return what makes a decompressor of one frame, and the exception that it raises."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        import zstandard

        library = zstandard.ZstdDecompressor(max_window_size=1 << ZSTD_LARGEST_WINDOW_LOG)
        return library.decompressobj, zstandard.ZstdError
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_LARGEST_WINDOW_LOG}
    return (lambda: zstd.ZstdDecompressor(options=options)), zstd.ZstdError
