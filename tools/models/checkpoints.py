"""Read and write Megatron's distributed checkpoints (torch_dist) in one process."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.remoe.files.errors import UsageError
from megatron.remoe.patches.checkpoints import refuse_unsafe_objects
from megatron.remoe.routing.router import RELU_KEY
from megatron.remoe.start.checkpoint_files import (
    RELEASE,
    TRACKER,
    check_complete,
    newest_complete,
    newest_iteration,
)
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, read_index, unwrap

from ..console import files
from ..console.errors import ConversionError
from .measuring import check_finite

EMBEDDING = "embedding.word_embeddings.weight"
FAILURES = (Exception, CheckpointException)  # a damaged file can raise anything; CheckpointException is no Exception
LAYOUT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, RELU_KEY: True}


@dataclass(frozen=True)
class Checkpoint:
    """One saved iteration.

    Attributes:
        folder: of this iteration.
        name: for messages.
        args: Megatron's arguments of the run; `padded_vocab_size` is the embedding's number of rows.
        layout: Megatron's metadata about the format of the tensors.
        index: of all tensors and objects.
    """

    folder: Path
    name: str
    args: argparse.Namespace
    layout: dict[str, Any]
    index: Metadata


def find(root: Path, step: int | None) -> Checkpoint:
    """Return a run's newest checkpoint, or that of a given iteration.

    Args:
        root: folder of the run's checkpoints, or its parent.
        step: the iteration (None: the newest).

    Raises:
        ConversionError: there is no checkpoint, it cannot be read, or it has a different format.
    """
    folder, common, index = open_folder(root, step)
    args = common.get("args")
    if args is None:
        raise ConversionError(f"{folder}: holds no training arguments, so the model's shape is unknown.")
    embedding = index.state_dict_metadata.get(EMBEDDING)
    if not isinstance(embedding, TensorStorageMetadata):
        raise ConversionError(f"{folder}: has no {EMBEDDING}, so it is not a GPT model.")
    args.padded_vocab_size = embedding.size[0]
    return Checkpoint(
        folder=folder,
        name=f"{folder.parent}, {'release' if folder.name == RELEASE else f'iteration {int(folder.name[5:])}'}",
        args=args,
        layout=dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {},
        index=index,
    )


def load(checkpoint: Checkpoint, model: GPTModel) -> None:
    """Load the checkpoint's weights into `model` with Megatron.

    Raises:
        ConversionError: a tensor is missing, has a different shape, cannot be read, or holds NaN or infinity.
    """
    # Objects are Transformer Engine's state for FP8, which no tool needs.
    sharded = _sharded(model, checkpoint.layout)
    _, wanted = extract_matching_values(sharded, lambda value: isinstance(value, ShardedObject))
    for tensor in _tensors(wanted):
        if tensor.key not in checkpoint.index.state_dict_metadata:
            tensor.key = rename_expert_norm(tensor.key)
    refuse_unsafe_objects()
    with reading(checkpoint.folder):
        loaded = dist_checkpointing.load({"model": wanted}, str(checkpoint.folder), validate_access_integrity=False)
    model.load_state_dict(loaded["model"], strict=False)
    check_finite(str(checkpoint.folder), model.state_dict())


class _Reader(FileSystemReader):
    """Read tensors with an index that was loaded without executing code in it."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        return self.index


def read_tensors(folder: Path, index: Metadata, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors from a checkpoint without loading the rest of it.

    Args:
        folder: of one iteration.
        index: from `read_index`.
        tensors: key → the tensor to fill, in its own dtype.

    Raises:
        ConversionError: a file is damaged.
    """
    with reading(folder):
        dcp.load(dict(tensors), storage_reader=_Reader(folder, index), no_dist=True)


def save(model: GPTModel, args: argparse.Namespace, output: Path) -> None:
    """Write a checkpoint without optimizer state. The folder appears only when it is complete.

    In Megatron's terms this is a release: training from it starts at iteration 0. Norms before experts are saved under
    both of their names, so that plain PyTorch layers and Transformer Engine's can load them.

    Args:
        model: its parameters are cast in place to `args.params_dtype`; Megatron keeps buffers, such as the bias of
            experts, in float32.
        args: the arguments to save with it.
        output: new or empty folder.

    Raises:
        ConversionError: it cannot be written.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(args.params_dtype)
    sharded = _sharded(model, LAYOUT)
    renamed = ((tensor, rename_expert_norm(tensor.key)) for tensor in _tensors(sharded))
    norms = [replace(tensor, key=key) for tensor, key in renamed if key != tensor.key]
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "num_floating_point_operations_so_far": 0}
    with new_folder(output) as aside:
        (aside / RELEASE).mkdir()
        dist_checkpointing.save(
            state | {"model": sharded, "norms": norms}, str(aside / RELEASE), content_metadata=dict(LAYOUT)
        )
        (aside / TRACKER).write_text(RELEASE, encoding="utf-8")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn an exception inside the block, except a UsageError, into a ConversionError that names `folder`."""
    try:
        yield
    except UsageError:
        raise
    except FAILURES as error:
        raise ConversionError(
            f"{folder}: cannot be read ({_reason(error)}). If it is damaged, choose an older one with --ckpt-step."
        ) from error


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `output` if the block ends without an exception.

    Args:
        output: an empty or missing folder.

    Raises:
        ConversionError: something cannot be written, for instance because the disk is full.
    """
    try:
        with files.new_folder(output) as aside:
            yield aside
    except UsageError:
        raise
    except FAILURES as error:
        raise ConversionError(
            f"--save {output}: cannot be written ({_reason(error)}). Free some space, or give a different folder.",
            "REMOE-E105",
        ) from error


def check_output(output: Path) -> None:
    """Raise ConversionError if something other than an empty folder exists there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(
            f"--save {output}: exists and is not an empty folder. Give a different one, or remove it.", "REMOE-E105"
        )


def open_folder(root: Path, step: int | None) -> tuple[Path, dict[str, Any], Metadata]:
    """Return an iteration's folder, its settings and counters, and its index; None for `step` means the newest.

    Raises:
        ConversionError: there is no such checkpoint, it is damaged, or it has one file per rank.
    """
    folder = find_folder(root, step)
    try:
        with reading(folder):
            return folder, check_complete(folder), read_index(folder)
    except BrokenCheckpointError as error:
        whole = newest_complete(folder.parent)
        remedy = "No iteration there is complete." if whole is None else f"--ckpt-step {whole} is complete."
        raise ConversionError(f"--load {folder.parent}: {error}. {remedy}", error.code) from error


def find_folder(root: Path, step: int | None) -> Path:
    """Return the folder of a run's iteration; None for `step` means the newest.

    Raises:
        ConversionError: there is no such folder, or it has one file per rank.
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
    if any(folder.glob("mp_rank_*")):
        raise ConversionError(
            f"{folder}: has one file per rank. Start the program that wrote it once more, with its flags and "
            "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, and give --load FOLDER/torch_dist here."
        )
    return folder


def _sharded(model: GPTModel, layout: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata=layout | {"dp_cp_group": group})


def _tensors(sharded: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            yield value


def rename_expert_norm(key: str) -> str:
    """Swap the two names of a norm before experts in a key; other keys stay unchanged.

    Plain PyTorch layers are saved with the name of a norm that is fused with the next linear layer. Transformer Engine
    does not fuse this norm.
    """
    plain, fused = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
    return key.replace(fused, plain) if fused in key else key.replace(plain, fused)


def _reason(error: BaseException) -> str:
    error = unwrap(error)  # the text of a CheckpointException is a traceback
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
