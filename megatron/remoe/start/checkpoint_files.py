"""Choose the checkpoint to resume from: the newest complete one."""

import argparse
import json
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron.remoe.files.errors import UsageError
from megatron.remoe.files.files import write_text
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, common_state, is_of_fsdp, read_index

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "metadata.json"  # the last file of a checkpoint that Megatron writes
RELEASE = "release"  # in the tracker, and as a folder: weights that no iteration belongs to
SECONDS_TO_APPEAR = 10
_FOLDER = re.compile(r"iter_(\d{7,15})")
_NUMBER = re.compile(r"[0-9]{1,15}")  # Megatron reads it into 64 bits


@dataclass(frozen=True)
class Resume:
    """The checkpoint to resume from, and the changes that Megatron needs to load it.

    Attributes:
        flag: --load or --pretrained-checkpoint.
        folder: of the iteration or release.
        saved: Megatron's arguments of the training that wrote it; None if it holds none.
        step: the iteration to set as --ckpt-step; None if Megatron chooses the same one.
        mends_tracker: whether the tracker file is missing or damaged; `apply` then writes `step` to it.
        notice: a line for the user, or "".
    """

    flag: str
    folder: Path
    saved: argparse.Namespace | None
    step: int | None = None
    mends_tracker: bool = False
    notice: str = ""

    def apply(self, args: argparse.Namespace) -> None:
        """Set --ckpt-step and an unused flag, mend the tracker file, and print the notice on the first rank."""
        if self.step is not None:
            args.ckpt_step, args.is_going_back = self.step, True
        if getattr(args, "position_embedding_type", "learned_absolute") != "learned_absolute":
            # Megatron compares this flag, although it has no effect with other position embeddings.
            args.add_position_embedding = getattr(self.saved, "add_position_embedding", True)
        if args.rank == 0 and self.notice:
            print(self.notice, file=sys.stderr, flush=True)
        if self.mends_tracker:  # on every rank: each one may read it before the others have mended it
            write_text(self.folder.parent / TRACKER, str(self.step))


def choose_checkpoint(args: argparse.Namespace) -> Resume | None:
    """Return the checkpoint to resume from; None if the run starts from random weights. Changes nothing.

    --pretrained-checkpoint is used if --load has no checkpoint yet. Every rank reads the same files and finds the same
    checkpoint.

    Raises:
        BrokenCheckpointError: the iteration of --ckpt-step is damaged (the message names a complete one), or all are.
    """
    step, pretrained = args.ckpt_step, args.pretrained_checkpoint
    if step is not None and step < 1:
        raise BrokenCheckpointError(
            f"--ckpt-step {step}: must be the number of a saved iteration, at least 1.", "REMOE-E402"
        )
    for flag, name in (("--load", args.load), ("--pretrained-checkpoint", pretrained)):
        if not name or "://" in name:
            continue
        root = Path(name)
        # Several checkpoints without a tracker file have lost it. A single one may be a first save that was cut off.
        has_tracker = os.path.lexists(root / TRACKER) or (step and not pretrained)
        if has_tracker or len(saved_iterations(root)) > 1 or newest_whole(root) is not None:
            return _choose(flag, root, step)
    return None


def _choose(flag: str, root: Path, step: int | None) -> Resume:
    saved_iterations(root)  # raises if a file has the name of an iteration's folder
    newest = newest_iteration(root)
    wanted = step or (int(newest) if _NUMBER.fullmatch(newest) else None)
    chosen = root / (RELEASE if newest == RELEASE else f"iter_{wanted or 0:07d}")
    try:
        if wanted is None and newest != RELEASE:
            state = f"holds {newest[:20]!r} instead of an iteration" if (root / TRACKER).is_file() else "is missing"
            raise BrokenCheckpointError(f"{root / TRACKER} {state}")
        return Resume(flag, chosen, check_is_whole(chosen).get("args"))
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
        whole = newest_whole(root, below=int(failed.name.removeprefix("iter_")) or None)
    if whole is None:
        raise BrokenCheckpointError(f"{flag} {root}: {problem}. No other checkpoint there is whole.")
    if step:
        raise BrokenCheckpointError(f"--ckpt-step {step}: {problem}. Iteration {whole} is whole.", "REMOE-E402")
    folder = root / f"iter_{whole:07d}"
    return Resume(
        flag,
        folder,
        common_state(folder).get("args"),
        step=whole,
        # Megatron reads the tracker before --ckpt-step, and exits with code 0 if it is damaged.
        mends_tracker=_NUMBER.fullmatch(newest_iteration(root)) is None,
        notice=f"{flag} {root}: {problem}. Going back to iteration {whole}.",
    )


def check_is_whole(folder: Path) -> dict[str, Any]:
    """Check that all files of a checkpoint exist and are complete, without reading tensors. Return its settings.

    Args:
        folder: `iter_...` of one iteration, as torch_dist, as fsdp_dtensor, or with one file per rank.

    Returns:
        What `common_state` returns.

    Raises:
        BrokenCheckpointError: names the file and the problem.
    """
    legacy = sorted(folder.glob("mp_rank_*/*.pt"))
    for file in legacy:
        if not zipfile.is_zipfile(file):
            raise BrokenCheckpointError(f"{file} cannot be read: it is truncated")
    if legacy:
        return common_state(folder)
    index = read_index(folder)
    if not is_of_fsdp(index):  # there the index is the last file
        try:
            json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise BrokenCheckpointError(f"{folder / CONFIG} is missing or empty: saving was cut off") from error
    check_sizes(folder, index)
    return common_state(folder, index)


def check_sizes(folder: Path, index: Metadata) -> None:
    """Check that all files in a checkpoint's index exist and have their length.

    Raises:
        BrokenCheckpointError: names the first that does not.
    """
    ends: dict[str, int] = {}
    for entry in index.storage_data.values():
        ends[entry.relative_path] = max(ends.get(entry.relative_path, 0), entry.offset + entry.length)
    for path, end in ((folder / name, end) for name, end in sorted(ends.items())):
        if not path.is_file():
            raise BrokenCheckpointError(f"{path} is missing")
        if path.stat().st_size < end:
            raise BrokenCheckpointError(f"{path} has {path.stat().st_size:,} bytes of {end:,}: it is truncated")


def wait_for_files(folder: Path) -> None:
    """Wait until the files that all ranks have saved are visible here; a network file system may take seconds.

    Raises:
        UsageError: names the first that is missing after `SECONDS_TO_APPEAR`.
    """
    index, end = read_index(folder), time.monotonic() + SECONDS_TO_APPEAR
    while True:
        try:
            return check_sizes(folder, index)
        except BrokenCheckpointError as error:
            if time.monotonic() > end:
                raise UsageError(
                    f"--save {folder.parent}: {error}. Give a folder that all nodes share.", "REMOE-E105"
                ) from error
        time.sleep(1)


def saved_iterations(root: Path) -> list[int]:
    """Return the iterations that have a folder under `root`, newest first, complete or not.

    Raises:
        BrokenCheckpointError: a file has the name of an iteration's folder, so saving that iteration would fail.
    """
    found = {int(match[1]): path for path in root.glob("iter_*") if (match := _FOLDER.fullmatch(path.name))}
    for path in found.values():
        if not path.is_dir():
            raise BrokenCheckpointError(
                f"{path} is no folder, and in the way of checkpoints. Move it away.", "REMOE-E403"
            )
    return sorted(found, reverse=True)


def newest_whole(root: Path, below: int | None = None, above: int = -1) -> int | None:
    """Return the iteration of the newest complete checkpoint between `above` and `below`; None if there is none."""
    for iteration in saved_iterations(root):
        if above < iteration and (below is None or iteration < below):
            try:
                check_is_whole(root / f"iter_{iteration:07d}")
                return iteration
            except BrokenCheckpointError:
                continue
    return None


def newest_iteration(root: Path) -> str:
    """Return the content of the tracker file: a number or `RELEASE` unless it is damaged; "" if it is missing.

    Raises:
        BrokenCheckpointError: it is a folder, so the next save would fail.
    """
    tracker = root / TRACKER
    if tracker.is_dir():
        raise BrokenCheckpointError(
            f"{tracker} is a folder. Remove it: the newest whole checkpoint is then found.", "REMOE-E403"
        )
    return tracker.read_text(errors="replace").strip() if tracker.is_file() else ""


def loaded_flag(args: argparse.Namespace) -> str:
    """Return the flag whose folder Megatron loads: --pretrained-checkpoint while --load has no tracker file."""
    has_own = args.load and os.path.lexists(os.path.join(args.load, TRACKER))
    return "--pretrained-checkpoint" if args.pretrained_checkpoint and not has_own else "--load"


def iteration_folder(root: Path, step: int | None = None) -> Path | None:
    """Return the folder of the iteration or release that Megatron loads with --ckpt-step; None if there is none."""
    newest = newest_iteration(root)
    if newest == RELEASE:
        return root / RELEASE
    return root / f"iter_{step or int(newest):07d}" if step or newest.isdecimal() else None
