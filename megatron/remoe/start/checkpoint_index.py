"""Read a checkpoint's index and settings without executing anything in them, and check them."""

import dataclasses
import enum
import hashlib
import io
import math
import pickle
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from megatron.remoe.files.errors import UsageError

INDEX = ".metadata"
INDEX_SUM = ".metadata.sha256"  # written by this package when a save is complete; other checkpoints have none
SUM_LENGTH = 64
OF_FSDP = ("args", "iteration", "checkpoint_version")  # Megatron reads these keys of fsdp_dtensor before all others
_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout")}
# PyTorch stores the path that it wrote to. Python 3.13 has another name for the module.
_PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}


class BrokenCheckpointError(UsageError):
    """A checkpoint is damaged or incomplete; the message names the file."""

    code = "REMOE-E401"


# Python's own unpickler is fast enough here. The one in C allocates as many table entries as a damaged file asks for,
# up to 64 GiB.
class _IndexUnpickler(pickle._Unpickler):
    """Load the types of torch's checkpoint index, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) in _PATHS:
            return PurePath
        # A dotted name could reach anything that a module imports: accept only plain records that it defines.
        if f"{module}.".startswith(_MODULES):
            found = super().find_class(module, name)
            own = isinstance(found, type) and (found.__module__, found.__qualname__) == (module, name)
            if own and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint's index does")


def index_sum(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's index, in hexadecimal."""
    return hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()


def read_index(folder: Path) -> Metadata:
    """Return torch's index of the tensors and objects in a torch_dist checkpoint.

    Args:
        folder: `iter_...` of one iteration.

    Raises:
        BrokenCheckpointError: it is missing, cannot be read, or contradicts itself.
    """
    index, noted = folder / INDEX, folder / INDEX_SUM
    if not index.is_file():
        raise BrokenCheckpointError(f"{index} is missing: saving was cut off")
    try:
        # An incomplete sum proves nothing.
        if noted.is_file() and len(seen := noted.read_bytes()) == SUM_LENGTH and seen != index_sum(folder).encode():
            raise ValueError(f"it has changed since it was saved, as {INDEX_SUM} shows")
        metadata: Metadata = _IndexUnpickler(io.BytesIO(index.read_bytes())).load()
        _check_places(metadata)
        for name, kind in metadata.state_dict_metadata.items():
            if isinstance(kind, TensorStorageMetadata):
                _check_tensor(name, kind, metadata)
            elif not isinstance(kind, BytesStorageMetadata) or MetadataIndex(name) not in metadata.storage_data:
                raise ValueError(f"{name} is neither a tensor nor a stored object")
    except Exception as error:  # a damaged file can raise anything
        reason = "it is damaged or truncated"
        if isinstance(error, ValueError | pickle.UnpicklingError) and str(error):
            reason = str(error).splitlines()[0][:200]
        raise BrokenCheckpointError(f"{index} cannot be read: {reason}") from error
    return metadata


def _check_places(index: Metadata) -> None:
    """Check that entries belong to known tensors and objects, in files of this folder, without overlap."""
    files: dict[str, list[tuple[int, int]]] = {}
    for key, entry in index.storage_data.items():
        name, numbers = entry.relative_path, (entry.offset, entry.length)
        if key.fqn not in index.state_dict_metadata or not isinstance(key.index, int | None):
            raise ValueError("it lists something that is no tensor or object of it")
        if Path(name).name != name or name == ".." or not name.isprintable():
            raise ValueError(f"it refers to a file outside its folder, {name!r}")
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError(f"{key.fqn} has no valid place in {name}")
        files.setdefault(name, []).append((entry.offset, entry.offset + entry.length))
    for name, places in files.items():
        if any(end > start for (_, end), (start, _) in pairwise(sorted(places))):
            raise ValueError(f"two parts of {name} overlap")


def _check_tensor(name: str, tensor: TensorStorageMetadata, index: Metadata) -> None:
    """Check that a tensor's parts are inside its shape and have enough bytes."""
    if not isinstance(tensor.properties.dtype, torch.dtype) or not isinstance(tensor.size, torch.Size):
        raise ValueError(f"{name} has no valid type or shape")
    for chunk in tensor.chunks:
        places = zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        if not all(0 <= first <= first + size <= whole for first, size, whole in places):
            raise ValueError(f"a part of {name} lies outside its shape")
        entry = index.storage_data[MetadataIndex(name, chunk.offsets)]
        needed = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
        if not entry.transform_descriptors and needed > entry.length:
            raise ValueError(f"a part of {name} has fewer bytes than its shape needs")


def is_of_fsdp(index: Metadata) -> bool:
    """Return whether an index is of Megatron-FSDP's format (fsdp_dtensor), which keeps the settings under a key."""
    return "args" in index.state_dict_metadata


def stored_object(folder: Path, entry: Any) -> io.BytesIO:
    """Return the bytes of an object in a checkpoint, as `torch.save` wrote them.

    Args:
        folder: `iter_...` of one iteration.
        entry: of the index's `storage_data`.
    """
    with (folder / entry.relative_path).open("rb") as stored:
        stored.seek(entry.offset)
        return io.BytesIO(stored.read(entry.length))


def check_object(name: str, content: io.BytesIO) -> None:
    """Check an object in a checkpoint without executing anything in it; normally a random number generator's state.

    Args:
        name: its key.
        content: from `stored_object`.

    Raises:
        BrokenCheckpointError: it cannot be read, or could run code.
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
        raise BrokenCheckpointError(
            f"{name} in the checkpoint refers to {', '.join(unknown)}, which no state of a training consists of and "
            "could run code. Nothing of it was executed. Give a checkpoint that you trust.",
            "REMOE-E405",
        )


def common_state(folder: Path, index: Metadata | None = None) -> dict[str, Any]:
    """Return the part of a checkpoint that all ranks share, without tensors; nothing in it is executed.

    "args" holds Megatron's arguments of the training that wrote it. With one file per rank (--ckpt-format torch), this
    is the whole file of the first rank, with tensors that are not read yet.

    Args:
        folder: `iter_...` of one iteration.
        index: from `read_index`, if it was read already.

    Raises:
        BrokenCheckpointError: it cannot be read, or holds objects that are not settings.
    """
    try:
        legacy = sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))
        if legacy or (folder / "common.pt").is_file():
            file = legacy[0] if legacy else folder / "common.pt"
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=bool(legacy))
        else:
            index = index or read_index(folder)
            stored = {
                key.fqn: torch.load(stored_object(folder, entry), map_location="cpu", weights_only=True)
                for key, entry in index.storage_data.items()
                if key.fqn in OF_FSDP or key.fqn.startswith("common_state/")
            }
            state = stored if is_of_fsdp(index) else next(iter(stored.values()), {})
        state = state[0] if isinstance(state, list) else state
        if isinstance(state, io.BytesIO):
            state.seek(0)
            state = torch.load(state, map_location="cpu", weights_only=True)
    except BrokenCheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BrokenCheckpointError(f"the settings saved in {folder} cannot be read ({reason[:200]})") from error
    return state if isinstance(state, dict) else {}
