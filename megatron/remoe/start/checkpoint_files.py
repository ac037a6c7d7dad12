"""Choose the checkpoint to resume from: the newest complete one."""

import argparse
import io
import json
import os
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron.remoe.files.files import write_text
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, read_index

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"  # the last file of a checkpoint that Megatron writes, except for integrity.json
RELEASE = "release"  # content of the tracker, and name of a folder, for weights without an iteration
_FOLDER = re.compile(r"iter_(\d{7,15})")
_NUMBER = re.compile(r"[0-9]{1,15}")  # Megatron reads it into 64 bits


@dataclass(frozen=True)
class Resume:
    """The checkpoint to resume from, and the changes that Megatron needs to load it.

    Attributes:
        flag: --load or --pretrained-checkpoint.
        folder: the folder of the iteration or release.
        saved: Megatron's arguments of the run that wrote the checkpoint; None if it holds none.
        step: the iteration to set as --ckpt-step; None if Megatron chooses the same one.
        notice: a line for the user, or "".
    """

    flag: str
    folder: Path
    saved: argparse.Namespace | None
    step: int | None = None
    notice: str = ""

    def apply(self, args: argparse.Namespace) -> None:
        """Set --ckpt-step, copy an unused position flag, repair the tracker file, and print the notice on rank 0.

        Also record the checkpoint as `args.resume_flag` and `args.resume_folder`.
        """
        args.resume_flag, args.resume_folder = self.flag, str(self.folder)
        if self.step is not None:
            args.ckpt_step, args.is_going_back = self.step, True
        if getattr(args, "position_embedding_type", "learned_absolute") != "learned_absolute":
            # Megatron compares this flag, although it has no effect with other position embeddings.
            args.add_position_embedding = getattr(self.saved, "add_position_embedding", True)
        if args.rank == 0 and self.notice:
            print(self.notice, file=sys.stderr, flush=True)
        # Megatron exits with code 0 if the tracker is damaged. Each rank repairs it before it reads it.
        root = self.folder.parent
        if self.step is not None and not _NUMBER.fullmatch(newest_iteration(root)):
            write_text(root / TRACKER, str(self.step))


def choose_checkpoint(args: argparse.Namespace) -> Resume | None:
    """Return the checkpoint to resume from; None if the run starts from random weights. Changes nothing.

    --pretrained-checkpoint is used if --load has no checkpoint yet. Every rank reads the same files and finds the same
    checkpoint.

    Raises:
        BrokenCheckpointError: the iteration of --ckpt-step is damaged (the message names a complete one), or all are.
    """
    step, pretrained = args.ckpt_step, args.pretrained_checkpoint
    for flag, name in (("--load", args.load), ("--pretrained-checkpoint", pretrained)):
        if name and "://" not in name:
            root = Path(name)
            # Without a tracker file, a single damaged iteration is a first save that was cut off.
            is_expected = os.path.lexists(root / TRACKER) or (step and not pretrained)
            if is_expected or newest_complete(root) is not None:
                return _choose(flag, root, step)
    return None


def _choose(flag: str, root: Path, step: int | None) -> Resume:
    newest = newest_iteration(root)
    wanted = step or (int(newest) if _NUMBER.fullmatch(newest) else None)
    chosen = root / (RELEASE if newest == RELEASE else f"iter_{wanted or 0:07d}")
    try:
        if wanted is None and newest != RELEASE:
            raise BrokenCheckpointError(f"{root / TRACKER} names no iteration")
        repaired = None if newest == RELEASE or _NUMBER.fullmatch(newest) else wanted
        return Resume(flag, chosen, check_complete(chosen).get("args"), repaired)
    except BrokenCheckpointError as error:
        return go_back(flag, chosen, str(error), step)


def go_back(flag: str, failed: Path, problem: str, step: int | None = None) -> Resume:
    """Return the newest complete checkpoint before one that cannot be used.

    Args:
        flag: --load or --pretrained-checkpoint.
        failed: the folder of the iteration or release; iteration 0 means that all are candidates.
        problem: the reason.
        step: --ckpt-step, if the user gave it.

    Raises:
        BrokenCheckpointError: the user asked for that iteration, or no earlier one is complete.
    """
    root, whole = failed.parent, None
    if failed.name != RELEASE:
        whole = newest_complete(root, below=int(failed.name.removeprefix("iter_")) or None)
        whole = newest_complete(root, above=step) if whole is None and step else whole
    if whole is None:
        raise BrokenCheckpointError(f"{flag} {root}: {problem}. No other checkpoint there is complete.")
    if step:
        raise BrokenCheckpointError(f"--ckpt-step {step}: {problem}. Iteration {whole} is complete.", "REMOE-E402")
    folder = root / f"iter_{whole:07d}"
    notice = f"{flag} {root}: {problem}. Going back to iteration {whole}."
    return Resume(flag, folder, common_state(folder).get("args"), whole, notice)


def check_complete(folder: Path) -> dict[str, Any]:
    """Check that all files of a checkpoint exist and are complete, without reading tensors. Return its settings.

    Args:
        folder: `iter_...` of one iteration or `release`, in the format torch_dist or torch.

    Returns:
        The settings, as `common_state` returns them.

    Raises:
        BrokenCheckpointError: a file is missing, truncated or unreadable; the message names it.
    """
    legacy = sorted(folder.glob("mp_rank_*/*.pt"))
    for file in legacy:
        if not zipfile.is_zipfile(file):
            raise BrokenCheckpointError(f"{file} cannot be read: it is truncated")
    if not legacy:
        index = read_index(folder)
        try:
            json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise BrokenCheckpointError(f"{folder / CONFIG} is missing or empty: saving was cut off") from error
        _check_sizes(folder, index)
    return common_state(folder)


def _check_sizes(folder: Path, index: Metadata) -> None:
    """Check that all files in a checkpoint's index exist and are long enough."""
    ends: dict[str, int] = {}
    for entry in index.storage_data.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    sizes = {file.name: file.stat().st_size for file in os.scandir(folder) if file.is_file()}
    for name, end in sorted(ends.items()):
        if name not in sizes:
            raise BrokenCheckpointError(f"{folder / name} is missing")
        if sizes[name] < end:
            raise BrokenCheckpointError(f"{folder / name} has {sizes[name]:,} bytes of {end:,}: it is truncated")


def newest_complete(root: Path, below: int | None = None, above: int = -1) -> int | None:
    """Return the newest complete checkpoint's iteration, strictly between `above` and `below`; None without one."""
    numbers = (int(match[1]) for path in root.glob("iter_*") if (match := _FOLDER.fullmatch(path.name)))
    for iteration in sorted(numbers, reverse=True):
        if above < iteration and (below is None or iteration < below):
            try:
                check_complete(root / f"iter_{iteration:07d}")
                return iteration
            except BrokenCheckpointError:
                continue
    return None


def newest_iteration(root: Path) -> str:
    """Return the content of the tracker file: a number or `RELEASE` unless it is damaged; "" if it is missing."""
    tracker = root / TRACKER
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else ""


def stored_object(folder: Path, entry: Any) -> io.BytesIO:
    """Return the bytes of an object in a checkpoint, as `torch.save` wrote them.

    Args:
        folder: `iter_...` of one iteration, or `release`.
        entry: a value of the index's `storage_data`.
    """
    with (folder / entry.relative_path).open("rb") as stored:
        stored.seek(entry.offset)
        return io.BytesIO(stored.read(entry.length))


def common_state(folder: Path) -> dict[str, Any]:
    """Return the part of a checkpoint that all ranks share, without tensors. No code in it is executed.

    "args" holds Megatron's arguments of the run that wrote it. With one file per rank (--ckpt-format torch), this is
    the whole file of the first rank, with tensors that are not read yet.

    Args:
        folder: `iter_...` of one iteration, or `release`.

    Raises:
        BrokenCheckpointError: this part cannot be read, or holds objects that could run code.
    """
    files = [*sorted(folder.glob("mp_rank_*/model_optim_rng.pt")), *folder.glob("common.pt")]
    try:
        if files:
            state = torch.load(files[0], map_location="cpu", weights_only=True, mmap=files[0].name != "common.pt")
        else:
            stored = (
                torch.load(stored_object(folder, entry), map_location="cpu", weights_only=True)
                for key, entry in read_index(folder).storage_data.items()
                if key.fqn.startswith("common_state/")
            )
            state = next(stored, {})
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
