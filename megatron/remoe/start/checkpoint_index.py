"""Read a checkpoint's index and objects without running code that they might contain."""

import dataclasses
import enum
import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron.remoe.files.errors import UsageError

INDEX = ".metadata"
_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout")}
# PyTorch stores the path that it wrote to. Python 3.13 has a different name for the module.
_PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}


class BrokenCheckpointError(UsageError):
    """A checkpoint is missing, damaged or incomplete; the message names the flag or the file."""

    code = "REMOE-E401"


def unwrap(error: BaseException) -> BaseException:
    """Return one rank's error if PyTorch has wrapped the errors of several ranks, else the given error."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return error


# The unpickler in C allocates as many table entries as a damaged file asks for, up to 64 GiB; Python's does not.
class _IndexUnpickler(pickle._Unpickler):
    """Load the types of torch's checkpoint index, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) in _PATHS:
            return PurePath
        # A dotted name could reach anything that a module imports: accept only plain records that it defines.
        if f"{module}.".startswith(_MODULES):
            record = super().find_class(module, name)
            is_its_own = isinstance(record, type) and (record.__module__, record.__qualname__) == (module, name)
            if is_its_own and (dataclasses.is_dataclass(record) or issubclass(record, enum.Enum)):
                return record
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not allowed in a checkpoint's index")


def read_index(folder: Path) -> Metadata:
    """Return torch's index of the tensors and objects in a checkpoint's folder, `iter_...`.

    Raises:
        BrokenCheckpointError: the index is missing or cannot be read, or refers to something that could run code.
    """
    index = folder / INDEX
    if not index.is_file():
        raise BrokenCheckpointError(f"{index} is missing: saving was cut off")
    try:
        metadata: Metadata = _IndexUnpickler(io.BytesIO(index.read_bytes())).load()
        assert all(entry.relative_path and entry.offset + entry.length for entry in metadata.storage_data.values())
    except Exception as error:  # a damaged file can raise anything
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is damaged or truncated"
        raise BrokenCheckpointError(f"{index} cannot be read: {reason[:200]}") from error
    return metadata


def check_object(name: str, content: io.BytesIO) -> None:
    """Check the bytes of an object in a checkpoint, usually a random number generator's state.

    Raises:
        BrokenCheckpointError: the object cannot be read, or could run code; the message gives its name.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(content)
        content.seek(0)
        if not unknown:
            torch.load(content, map_location="cpu", weights_only=True)
        content.seek(0)
    except Exception as error:  # a damaged object can raise anything
        raise BrokenCheckpointError(f"{name} in the checkpoint is damaged") from error
    if unknown:
        problem = f"{name} in the checkpoint refers to {', '.join(unknown)}, which could run code"
        raise BrokenCheckpointError(f"{problem}; nothing was executed. Give a different checkpoint.", "REMOE-E405")
