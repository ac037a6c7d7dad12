"""Read and write Megatron's distributed checkpoints (torch_dist) in one process."""

import argparse
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.remoe.files.errors import UsageError
from megatron.remoe.patches.checkpoints import load_objects_unexecuted, verify_loaded_bytes
from megatron.remoe.start.checkpoint_files import RELEASE, TRACKER, check_is_whole, newest_iteration, newest_whole
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, is_of_fsdp, read_index

from ..console import files
from ..console.errors import ConversionError

EMBEDDING = "embedding.word_embeddings.weight"
FAILURES = (Exception, CheckpointException)  # a damaged file can raise anything; PyTorch's own error is no Exception
LAYOUT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
PROBE = 2**26  # bytes to allocate as a test before a folder is written
OVERHEAD = 2**18  # minimum number of bytes of a checkpoint without its tensors
# Keys of a norm before experts: of plain PyTorch layers, and of Transformer Engine's.
LOCAL_NORM, ENGINE_NORM = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
ROUTER = re.compile(r".*\.layers\.(\d+\.)?mlp\.router\.")  # with the layer's number if layers differ


@dataclass(frozen=True)
class Checkpoint:
    """One saved iteration.

    Attributes:
        folder: of this iteration.
        name: for messages.
        args: Megatron's arguments of the training, with the rows of the embedding.
        layout: Megatron's metadata about the format of the tensors.
        index: of all tensors and objects.
        shapes: tensor's key → its shape.
    """

    folder: Path
    name: str
    args: argparse.Namespace
    layout: dict[str, Any]
    index: Metadata
    shapes: dict[str, tuple[int, ...]]


def find(root: Path, step: int | None) -> Checkpoint:
    """Return a run's newest checkpoint, or the one of an iteration.

    Args:
        root: folder of the run's checkpoints, or the folder above it.
        step: the iteration (None: the newest).

    Raises:
        ConversionError: there is no checkpoint, it cannot be read, or it has another format.
    """
    folder = find_folder(root, step)
    root = folder.parent
    if any(folder.glob("mp_rank_*")):
        raise ConversionError(
            f"{folder}: has one file per rank. Convert it to a distributed checkpoint with Megatron's "
            "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, and load FOLDER/torch_dist."
        )
    try:
        with reading(folder):
            common = check_is_whole(folder)
            index = read_index(folder)
    except BrokenCheckpointError as error:
        whole = newest_whole(root)
        remedy = "No iteration there is whole." if whole is None else f"--ckpt-step {whole} is whole."
        raise ConversionError(f"--load {root}: {error}. {remedy}", error.code) from error
    if is_of_fsdp(index):
        raise ConversionError(f"{folder}: is Megatron-FSDP's. Use remoe convert --from-fsdp first.")
    args = common.get("args")
    if args is None:
        raise ConversionError(f"{folder}: holds no arguments of its training, so the model's shape is unknown.")
    stored = index.state_dict_metadata
    shapes = {key: tuple(entry.size) for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    if EMBEDDING not in shapes:
        raise ConversionError(f"{folder}: has no {EMBEDDING}; it is not that of a GPT model.")
    args.padded_vocab_size = shapes[EMBEDDING][0]
    return Checkpoint(
        folder=folder,
        name=f"{root}, {'release' if folder.name == RELEASE else f'iteration {int(folder.name[5:])}'}",
        args=args,
        layout=dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {},
        index=index,
        shapes=shapes,
    )


def load(checkpoint: Checkpoint, model: GPTModel) -> None:
    """Load the checkpoint's weights into `model` with Megatron.

    Raises:
        ConversionError: a tensor is missing, has another shape, cannot be read, or holds NaN or infinity.
    """
    # Leave out objects: they are Transformer Engine's state for FP8.
    _, wanted = extract_matching_values(_sharded(model, checkpoint.layout), lambda one: isinstance(one, ShardedObject))
    for tensor in _tensors(wanted):
        if tensor.key not in checkpoint.shapes:
            tensor.key = _other_name(tensor.key)
        if tensor.key not in checkpoint.shapes:
            raise ConversionError(
                f"{checkpoint.folder}: has no {tensor.key}, which its arguments call for. Only models that "
                "pretrain_gpt.py trains can be converted."
            )
        if isinstance(tensor, ShardedTensor) and tuple(tensor.global_shape) != checkpoint.shapes[tensor.key]:
            raise ConversionError(
                f"{checkpoint.folder}: {tensor.key} has the shape {list(checkpoint.shapes[tensor.key])}, and its "
                f"arguments call for {list(tensor.global_shape)}."
            )
    load_objects_unexecuted()
    verify_loaded_bytes()
    with reading(checkpoint.folder):
        loaded = dist_checkpointing.load({"model": wanted}, str(checkpoint.folder), validate_access_integrity=False)
    model.load_state_dict(loaded["model"], strict=False)
    for name, value in model.state_dict().items():
        if torch.is_tensor(value) and not torch.isfinite(value).all():
            raise ConversionError(
                f"{checkpoint.folder}: {name} holds values that are not finite. Choose an earlier iteration with "
                "--ckpt-step."
            )


class _Planner(DefaultLoadPlanner):
    """Let PyTorch's planner read slices of stored tensors."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]


def read_parts(folder: Path, index: Metadata, parts: dict[str, tuple[torch.Tensor, int | None]]) -> None:
    """Fill tensors from a checkpoint without loading the rest of it.

    Args:
        folder: of one iteration.
        index: from `read_index`.
        parts: key → the tensor to fill, in its own dtype, and the index of the slice in the first dimension (None: the
            whole tensor). A slice keeps that dimension with size 1.

    Raises:
        ConversionError: a file is damaged.
    """
    reader, planner, items = FileSystemReader(folder), _Planner(False, False), []
    with reading(folder):
        planner.set_up_planner({key: data for key, (data, _) in parts.items()}, index)
        for key, (data, number) in parts.items():
            offsets = torch.Size([number or 0, *[0] * (data.dim() - 1)][: data.dim()])
            chunk = ChunkStorageMetadata(offsets, data.shape)
            stored = index.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata), key
            items += create_read_items_for_chunk_list(key, stored, [chunk])
        reader.set_up_storage_reader(index, is_coordinator=True)
        reader.read_data(LoadPlan(items), planner).wait()


def save(model: GPTModel, args: argparse.Namespace, output: Path) -> None:
    """Write a checkpoint without optimizer state. The folder appears only when it is complete.

    In Megatron's terms this is a release: training from it starts at iteration 0.

    Args:
        model: its parameters are rounded to `args.params_dtype`; Megatron keeps buffers, such as the bias of experts,
            in float32.
        args: the arguments to save with them; `transformer_impl` decides whose names tensors have.
        output: new or empty folder.

    Raises:
        ConversionError: it cannot be written.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(args.params_dtype)
    sharded = _sharded(model, LAYOUT)
    if args.transformer_impl == "transformer_engine":
        routers = {match[0] for tensor in _tensors(sharded) if (match := ROUTER.match(tensor.key))}
        for tensor in _tensors(sharded):
            layer = re.split(f"{LOCAL_NORM}|{ENGINE_NORM}", tensor.key)[0]
            if layer != tensor.key and (f"{layer}mlp.router." in routers) == (LOCAL_NORM in tensor.key):
                tensor.key = _other_name(tensor.key)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0}
    size = sum(tensor.nbytes for tensor in model.state_dict().values() if torch.is_tensor(tensor))
    with new_folder(output, size + OVERHEAD) as aside:
        (aside / RELEASE).mkdir()
        dist_checkpointing.save(state | {"model": sharded}, str(aside / RELEASE), content_metadata=dict(LAYOUT))
        (aside / TRACKER).write_text(RELEASE, encoding="utf-8")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn any exception inside the block into a ConversionError that names the checkpoint's folder."""
    try:
        yield
    except UsageError:
        raise
    except FAILURES as error:
        raise ConversionError(
            f"{folder}: cannot be read ({_reason(error)}). If it is damaged, choose another iteration with --ckpt-step."
        ) from error


@contextmanager
def new_folder(output: Path, size: int) -> Iterator[Path]:
    """Yield a temporary folder with enough room; rename it to `output` if the block ends without an exception.

    Args:
        output: an empty or missing folder.
        size: approximate number of bytes that will be written.

    Raises:
        ConversionError: something cannot be written, for instance because the disk is full.
    """
    try:
        with files.new_folder(output) as aside:
            # On a full disk, Megatron's writers end in a traceback.
            if (free := shutil.disk_usage(aside).free) < size:
                raise OSError(errno.ENOSPC, f"{size:,} bytes are needed, and {free:,} are free")
            with tempfile.TemporaryFile(dir=aside) as file:
                os.posix_fallocate(file.fileno(), 0, max(1, min(size, PROBE)))  # detects quotas and limits too
            yield aside
    except UsageError:
        raise
    except FAILURES as error:
        raise ConversionError(
            f"--save {output}: cannot be written ({_reason(error)}). Free some space, or give another folder.",
            "REMOE-E105",
        ) from error


def check_output(output: Path) -> None:
    """Raise ConversionError for a folder that is not empty or a mount point, or something else than a folder."""
    if output.resolve().is_mount():
        raise ConversionError(f"--save {output}: is a mount point. Give a new folder in it.", "REMOE-E105")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(
            f"--save {output}: exists and is not an empty folder. Give another one, or remove it.", "REMOE-E105"
        )


def find_folder(root: Path, step: int | None) -> Path:
    """Return the folder of a run's newest iteration, or of the given one.

    Raises:
        ConversionError: there is none.
    """
    if not newest_iteration(root) and newest_iteration(root / "checkpoints"):
        root /= "checkpoints"
    newest = newest_iteration(root) if step is None else str(step)
    if not newest:
        raise ConversionError(f"--load {root}: is no run's folder of checkpoints: it has no {TRACKER}.", "REMOE-E404")
    if step is None and newest != RELEASE and not (newest.isdecimal() and len(newest) < 20):
        raise ConversionError(f"{root / TRACKER}: holds {newest[:20]!r}, not an iteration. Name one with --ckpt-step.")
    folder = root / (RELEASE if newest == RELEASE else f"iter_{int(newest):07d}")
    if not folder.is_dir():
        present = ", ".join(sorted(path.name for path in root.glob("iter_*"))) or "none"
        raise ConversionError(f"{folder}: no such checkpoint. Present: {present}.", "REMOE-E402")
    return folder


def _sharded(model: GPTModel, layout: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata=layout | {"dp_cp_group": group})


def _tensors(sharded: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value


def _other_name(key: str) -> str:
    names = (LOCAL_NORM, ENGINE_NORM) if LOCAL_NORM in key else (ENGINE_NORM, LOCAL_NORM)
    return key.replace(*names)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # its text is a traceback
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
