"""Looks at checkpoints before Megatron loads them: whether they are whole, and which one a cut-off run goes on from."""

import argparse
import dataclasses
import enum
import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"  # the last file of a checkpoint that Megatron writes
RELEASE = "release"  # in the tracker, and as a folder: weights that no iteration belongs to
_FOLDER = re.compile(r"iter_(\d{7,})")
_METADATA_MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_METADATA_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout")}


class BrokenCheckpointError(ValueError):
    """A checkpoint is not whole; the message names the file."""


class _MetadataUnpickler(pickle.Unpickler):
    """Loads what torch's checkpoint index consists of and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _METADATA_NAMES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        # A name may lead through attributes to what a module merely imports: only its own plain records are let in.
        if f"{module}.".startswith(_METADATA_MODULES):
            found = super().find_class(module, name)
            own = isinstance(found, type) and (found.__module__, found.__qualname__) == (module, name)
            if own and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint's index does")


def read_index(folder: Path) -> Any:
    """What torch wrote about the tensors and objects of a torch_dist checkpoint; nothing in it is executed.

    Args:
        folder: `iter_...` of one iteration.

    Raises:
        BrokenCheckpointError: it is missing or cannot be read.
    """
    index = folder / ".metadata"
    if not index.is_file():
        raise BrokenCheckpointError(f"{index} is missing: saving was cut off")
    try:
        with index.open("rb") as file:
            return _MetadataUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, ValueError) as error:
        raise BrokenCheckpointError(f"{index} cannot be read: {error or 'it is truncated'}") from error


def check_is_whole(folder: Path) -> None:
    """Whether each file of a torch_dist checkpoint is there and as long as the index says; reads no tensors.

    Args:
        folder: `iter_...` of one iteration.

    Raises:
        BrokenCheckpointError: with the file and what is wrong with it.
    """
    try:
        entries = read_index(folder).storage_data
    except AttributeError as error:
        raise BrokenCheckpointError(f"{folder / '.metadata'} cannot be read: {error}") from error
    try:
        json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise BrokenCheckpointError(f"{folder / CONFIG} is missing or empty: saving was cut off") from error
    ends: dict[str, int] = {}
    for entry in entries.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpointError(f"{path} is missing")
        if path.stat().st_size < end:
            raise BrokenCheckpointError(f"{path} has {path.stat().st_size:,} bytes of {end:,}: it is truncated")


def saved_iterations(folder: Path) -> list[int]:
    """The iterations that have a folder in a checkpoint folder, newest first, whole or not."""
    found = (_FOLDER.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_whole(folder: Path, below: int | None = None) -> int | None:
    """The newest whole checkpoint's iteration, of those below `below`; None where there is none."""
    for iteration in saved_iterations(folder):
        if below is not None and iteration >= below:
            continue
        try:
            check_is_whole(folder / f"iter_{iteration:07d}")
        except BrokenCheckpointError:
            continue
        return iteration
    return None


def loaded_from(args: argparse.Namespace) -> tuple[str, Path] | None:
    """The flag and the folder that Megatron will load from; None where it starts from random weights.

    --pretrained-checkpoint counts where there is nothing under --load yet.
    """
    pretrained = args.pretrained_checkpoint
    for flag, folder in (("--load", args.load), ("--pretrained-checkpoint", pretrained)):
        if (
            folder
            and "://" not in folder
            and ((Path(folder) / TRACKER).is_file() or (args.ckpt_step and not pretrained))
        ):
            return flag, Path(folder)
    return None


def newest_iteration(folder: Path) -> str:
    """What Megatron noted as the newest checkpoint: a number or `RELEASE`, if it is not damaged; empty if none."""
    tracker = folder / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else ""


def choose_checkpoint(args: argparse.Namespace) -> None:
    """Let a run that was cut off go on from its newest whole checkpoint: sets `args.ckpt_step` where it has to go back.

    Every rank finds the same, from the same files. Checkpoints of other formats than torch_dist are left to Megatron.

    Args:
        args: Megatron's parsed arguments.

    Raises:
        BrokenCheckpointError: the iteration asked for by --ckpt-step is not whole, or none is; names the iteration to
            go back to.
    """
    place = loaded_from(args)
    if place is None:
        return
    flag, folder = place
    tracker, newest = folder / TRACKER, newest_iteration(folder)
    released = newest == RELEASE
    wanted = None if released else args.ckpt_step or (int(newest) if newest.isdecimal() else None)
    try:
        if wanted is None and not released:
            raise BrokenCheckpointError(f"{tracker} holds {newest[:20]!r} instead of an iteration")
        chosen = folder / (RELEASE if released else f"iter_{wanted:07d}")
        if any(chosen.glob("mp_rank_*")):
            return  # another format
        check_is_whole(chosen)
    except BrokenCheckpointError as error:
        whole = None if released else newest_whole(folder, below=wanted)
        if whole is None:
            raise BrokenCheckpointError(f"{flag} {folder}: {error}. No other checkpoint there is whole.") from error
        if args.ckpt_step:
            raise BrokenCheckpointError(f"--ckpt-step {wanted}: {error}. Iteration {whole} is whole.") from error
        args.ckpt_step = whole
        if args.rank == 0:
            print(f"{flag} {folder}: {error}. Going back to iteration {whole}.", file=sys.stderr, flush=True)
            if wanted is None:
                # Megatron would end, with exit code 0, before it looks at --ckpt-step. The other ranks read it later.
                aside = tracker.with_suffix(".new")
                aside.write_text(str(whole))
                aside.replace(tracker)
