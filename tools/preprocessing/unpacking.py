"""Unpacks gzip and zstd data piece by piece, and notices when it ends too early."""

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
ZSTD_PACKED_BYTES = 1 << 14  # what is unpacked in one step: zstd's best ratio keeps this bounded
ZSTD_LARGEST_WINDOW = 1 << 31


class DamagedDataError(Exception):
    """Compressed data that ends too early or cannot be unpacked."""


def compression_of(name: str, start: bytes) -> str | None:
    """How an input is compressed, by its first bytes: "gzip", "zstd" or None.

    Raises:
        DataError: the name says otherwise, or nothing here can unpack it.
    """
    if start.startswith(GZIP_MAGIC):
        return "gzip"
    if start.startswith(ZSTD_MAGIC) or (start[1:4] == ZSTD_SKIPPED_MAGIC and start[0] >> 4 == 5):
        if _zstd() is None:
            raise DataError(
                f"--input {name}: is zstd data, which this Python cannot unpack. "
                "Install the package zstandard (pip install zstandard), or pipe it in: zstd -dc FILE | ... --input -"
            )
        return "zstd"
    if name.endswith((".gz", ".zst")):
        kind = "gzip" if name.endswith(".gz") else "zstd"
        raise DataError(f"--input {name}: is not {kind} data, as its name says. Copy it anew, or rename it.")
    return None


def unpack(file: BufferedReader, compression: str | None) -> Iterator[bytes]:
    """The contents of a file in pieces of bounded size.

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
            # read1() hands over what comes before the damage; read() would lose it.
            while piece := unpacked.read1(PIECE_BYTES):
                yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedDataError(str(error)) from error


def _from_zstd(file: BufferedReader) -> Iterator[bytes]:
    library = _zstd()
    assert library is not None, "compression_of() refuses the input otherwise"
    frame, problem = library
    # Frame by frame: a reader of the whole stream takes a truncated file for a complete one.
    unpacker = None
    try:
        while packed := file.read(ZSTD_PACKED_BYTES):
            while packed:
                unpacker = unpacker or frame()
                if piece := unpacker.decompress(packed):
                    yield piece
                packed = unpacker.unused_data if unpacker.eof else b""
                unpacker = None if unpacker.eof else unpacker
    except problem as error:
        raise DamagedDataError(str(error)) from error
    if unpacker is not None:
        raise DamagedDataError("the file ends before the data does")


def _zstd() -> tuple[Callable[[], Any], type[Exception]] | None:
    """What makes an unpacker of one frame, and what that raises; None if nothing here unpacks zstd."""
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard
        except ImportError:
            return None
        whole = zstandard.ZstdDecompressor(max_window_size=ZSTD_LARGEST_WINDOW)
        return whole.decompressobj, zstandard.ZstdError
    options = {zstd.DecompressionParameter.window_log_max: ZSTD_LARGEST_WINDOW.bit_length() - 1}
    return (lambda: zstd.ZstdDecompressor(options=options)), zstd.ZstdError
