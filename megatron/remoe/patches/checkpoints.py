"""Checkpoints: read without running what is in them, checked once loaded, and durable once reported as saved."""

import io
import multiprocessing
import os
import signal
import threading
from functools import wraps
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.remoe.preflight.checkpoint_files import RELEASE, TRACKER, sync_to_disk, write_durably
from megatron.remoe.preflight.checkpoint_fit import check_is_finite
from megatron.remoe.preflight.checkpoint_index import INDEX, INDEX_SUM, BrokenCheckpointError, index_sum
from megatron.training import checkpointing, training
from megatron.training.global_vars import get_args


def load_objects_unexecuted() -> None:
    """Refuse what could run code among a checkpoint's objects, such as the states of random number generators.

    PyTorch unpickles them without restriction, though Megatron has a list of what they consist of.
    """
    load_bytes = MCoreLoadPlanner.load_bytes
    if hasattr(load_bytes, "__wrapped__"):
        return

    @wraps(load_bytes)
    def load_known_bytes(self: MCoreLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        name = f"{read_item.dest_index.fqn} in the checkpoint"
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(value)
            value.seek(0)
            if not unknown:
                torch.load(value, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever reading a damaged object raises
            raise BrokenCheckpointError(
                f"{name} is damaged. Give an earlier iteration with --ckpt-step.", "REMOE-E405"
            ) from error
        if unknown:
            raise BrokenCheckpointError(
                f"{name} refers to {', '.join(unknown)}, which no state of a training consists of and could run code. "
                "Nothing of it was executed. Give a checkpoint that you trust.",
                "REMOE-E405",
            )
        value.seek(0)
        load_bytes(self, read_item, value)

    MCoreLoadPlanner.load_bytes = load_known_bytes


def keep_saving_possible() -> None:
    """Start the process that holds Megatron's queue of written shards, such that it outlives SIGTERM.

    Every save needs it. Megatron starts it at the first one, and SIGTERM ends it; Slurm sends SIGTERM to all processes
    of a step, so that the save which --exit-signal-handler then makes would fail. Forked here it also starts at once;
    Megatron spawns it, which imports everything anew. It ends with its parent: it would keep the log's pipe open.
    """
    if filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(_serve_until_the_parent_ends)
    filesystem_async._results_queue = manager.Queue()


def _serve_until_the_parent_ends() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def tell_why_writing_fails() -> None:
    """Keep file and reason where part of a checkpoint cannot be written: Megatron keeps only the type of the error."""
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    if getattr(write, "tells_why", False):
        return

    @wraps(write)
    def write_or_tell(*arguments: Any, **options: Any) -> Any:
        output = write(*arguments, **options)
        error = output[1]
        if not isinstance(error, Exception) or options["results_queue"] is not None:
            return output  # written, or in a thread of Megatron's that has to come to its end
        while not isinstance(error, OSError) and error.__context__ is not None:
            error = error.__context__  # PyTorch's own complaint about the file that it could not go on with
        raise RuntimeError(f"{options['write_bucket'][0]}: {error}") from error

    write_or_tell.tells_why = True  # type: ignore[attr-defined]
    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(write_or_tell)


def check_loaded_weights() -> None:
    """Refuse weights that are not finite, and end in an error where Megatron ends a failed load with exit code 0.

    Megatron has no hook between loading and training.
    """
    load = training.load_checkpoint
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_and_check(model: list[torch.nn.Module], *rest: Any, **options: Any) -> Any:
        args = get_args()
        has_own = args.load and (args.ckpt_step or os.path.lexists(os.path.join(args.load, TRACKER)))
        source = f"--load {args.load}"
        if args.pretrained_checkpoint and not has_own:
            source = f"--pretrained-checkpoint {args.pretrained_checkpoint}"
        try:
            loaded = load(model, *rest, **options)
        except SystemExit as stop:
            raise BrokenCheckpointError(
                f"{source}: cannot be loaded, for the reason that Megatron prints above. If it is damaged, give an "
                "earlier iteration with --ckpt-step."
            ) from stop
        for chunk in model:
            check_is_finite(source, chunk)
        return loaded

    training.load_checkpoint = load_and_check


class _Tracker(io.StringIO):
    """A tracker file that is written when everything that it refers to is on the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed:
            name = self.getvalue().strip()
            folder = self._path.parent / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")
            if (folder / INDEX).is_file():
                (folder / INDEX_SUM).write_text(index_sum(folder))
            for path in folder.rglob("*"):
                sync_to_disk(path)
            sync_to_disk(folder)
            write_durably(self._path, name)
        super().close()


class _DurableStorage:
    """Megatron's access to files, but for the tracker."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def open(self, path: str, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "w" and os.path.basename(path) == TRACKER and "://" not in path:
            return _Tracker(Path(path))
        return self._stock.open(path, mode, *rest, **options)


def save_durably() -> None:
    """Have a checkpoint on the disk before it is reported as saved, with a checksum of its index.

    Megatron waits for the tensors alone. After a power cut its small files may be empty, and so may the tracker.
    """
    if not isinstance(checkpointing.maybe_msc, _DurableStorage):
        checkpointing.maybe_msc = _DurableStorage(checkpointing.maybe_msc)
