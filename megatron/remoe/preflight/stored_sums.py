"""Compares what is read from a checkpoint with the CRC-32 sums that `torch.save` stores with each tensor and object.

The sums are in every checkpoint, whatever wrote it. PyTorch writes them and does not look at them when it loads.
"""

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

from megatron.remoe.preflight.checkpoint_index import BrokenCheckpointError


def check_places(path: Path, places: Iterable[tuple[int, int]]) -> None:
    """Check parts of a file, each of which `torch.save` wrote.

    Args:
        path: a file of a checkpoint.
        places: offset and length of each part, in bytes; one at a time is read into memory, but for a whole file.

    Raises:
        BrokenCheckpointError: names the file.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for offset, length in places:
            file.seek(offset)
            try:
                with zipfile.ZipFile(file if length == size else io.BytesIO(file.read(length))) as archive:
                    has_sums = any(record.CRC for record in archive.infolist())
                    if has_sums and (record := archive.testzip()):
                        raise zipfile.BadZipFile(record)
            except OSError:
                raise
            except Exception as error:  # whatever reading a damaged archive raises
                raise BrokenCheckpointError(
                    f"{path} has changed since it was saved ({error}, {length:,} bytes from {offset:,})"
                ) from error
