"""Checkpoints that are read without running what is in them, and written or not with a word why."""

import io
import multiprocessing
import os
import signal
import threading
from functools import wraps
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.remoe.preflight.checkpoint_files import BrokenCheckpointError


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
            raise BrokenCheckpointError(f"{name} is damaged. Give an earlier iteration with --ckpt-step.") from error
        if unknown:
            raise BrokenCheckpointError(
                f"{name} refers to {', '.join(unknown)}, which no state of a training consists of and could run code. "
                "Nothing of it was executed. Give a checkpoint that you trust."
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
