"""Load checkpoints without running code from them, go back from damaged ones, and report failed saves."""

import atexit
import io
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from megatron.core.rerun_state_machine import Call, Caller
from megatron.remoe.patches.patch import patch, replace
from megatron.remoe.routing.router import RELU_KEY
from megatron.remoe.start.checkpoint_files import go_back
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, check_object, unwrap
from megatron.training import checkpointing, initialize, training
from megatron.training.global_vars import get_args


@patch(
    changes={"core.dist_checkpointing.strategies.torch:MCoreLoadPlanner": "859d936f"},
    provides="protection from code in a checkpoint's objects",
    ends="load_bytes unpickles with weights_only=True",
    is_needed=True,
)
def refuse_unsafe_objects() -> None:
    """Refuse checkpoint objects that could run code.

    PyTorch unpickles them without restriction, although Megatron lists the safe types.
    """
    torch.serialization.add_safe_globals([Call, Caller])  # checkpoints after a NaN hold these

    @replace(DefaultLoadPlanner, "load_bytes")
    def load_bytes(stock: Any, self: DefaultLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        check_object(read_item.dest_index.fqn, value)
        stock(self, read_item, value)


@patch(
    changes={"training.training:load_checkpoint": "4f03d48a"},
    provides="going back from a damaged checkpoint; errors for failed loads; the schedule with --no-load-optim",
    ends="Megatron has a hook after loading, no sys.exit() in checkpointing.py, and keeps the schedule",
    is_needed=True,
)
def go_back_from_damage() -> None:
    """Go back to the previous complete iteration if a checkpoint fails --verify-integrity or holds a damaged object.

    Checkpoints without Megatron's hashes are loaded without this check. Failed loads that Megatron ends with exit code
    0 become errors. With --no-load-optim, the learning rate's schedule continues from the checkpoint.
    """

    @replace(training, "load_checkpoint")
    def load(stock: Any, model: list[torch.nn.Module], *rest: Any, **options: Any) -> Any:
        args = get_args()
        asked = None if getattr(args, "is_going_back", False) else args.ckpt_step
        verifies = args.verify_integrity
        while True:
            flag, folder = args.resume_flag, Path(args.resume_folder)
            is_hashed = not args.resume_folder or (folder / INTEGRITY_FNAME).is_file()
            args.verify_integrity = verifies and is_hashed
            try:
                loaded = stock(model, *rest, **options)
                break
            except SystemExit as stop:
                raise BrokenCheckpointError(
                    f"{flag} {folder}: cannot be loaded, for the reason that Megatron prints above. If it is damaged, "
                    "give an earlier iteration with --ckpt-step."
                ) from stop
            except (BrokenCheckpointError, CheckpointingException, CheckpointException) as error:
                cause = unwrap(error)  # all ranks fail in the same way
                is_damage = getattr(cause, "code", "") == BrokenCheckpointError.code
                if not folder.name or not (is_damage or "integrity verification failed" in str(cause)):
                    raise cause from None
                go_back(flag, folder, " ".join(str(cause).split()), asked).apply(args)
            finally:
                args.verify_integrity = verifies
        if args.no_load_optim and not args.finetune and loaded[0] and len(rest) > 1 and rest[1] is not None:
            rest[1].step(args.consumed_train_samples)  # Megatron leaves the schedule of the learning rate at its start
        return loaded


@patch(
    changes={"training.checkpointing:_build_sharded_state_dict_metadata": "c58be239"},
    provides="checkpoints of ReLU routing that no program loads as top-k routing",
    ends="Megatron compares the routing of a checkpoint with the model's",
    for_saving=True,
    is_needed=True,
)
def name_relu_routers() -> None:
    """Save the weight of a ReLU router under a name that Megatron's own router does not look for."""

    @replace(checkpointing, "_build_sharded_state_dict_metadata")
    def build(stock: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        return stock(*arguments, **options) | {RELU_KEY: True}


@patch(
    changes={
        "core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue": "e395fb0e",
        "training.initialize:init_persistent_async_worker": "ecf8aa39",
    },
    provides="the checkpoint that is saved at SIGTERM where the signal goes to all processes, as Slurm's does",
    ends="the processes of the queue and of --async-save ignore SIGTERM, or there are none",
    for_saving=True,
    is_needed=True,
)
def protect_saving_from_sigterm() -> None:
    """Keep two processes alive at SIGTERM: Megatron's queue of written shards, and the worker of --async-save.

    Slurm sends SIGTERM to all processes. Without these two, the save of --exit-signal-handler would fail or hang. Both
    end with the program. The queue's process ends even after SIGKILL, or it would keep the log's pipe open.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(_serve_until_the_parent_ends)
        filesystem_async._results_queue = manager.Queue()

    @replace(initialize, "init_persistent_async_worker")
    def start_worker(stock: Any, *arguments: Any, **options: Any) -> None:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker inherits this setting
        stock(*arguments, **options)
        atexit.register(_kill_children)  # runs before multiprocessing's exit code, which would send SIGTERM and wait
        signal.signal(signal.SIGTERM, before if callable(before) else lambda *_: sys.exit(1))  # runs atexit


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _serve_until_the_parent_ends() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@patch(
    changes={
        "core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data": "d6182c03",
    },
    provides="the file and the reason where a checkpoint cannot be written",
    ends="the error of a failed write reaches the caller whole",
    for_saving=True,
)
def report_write_errors() -> None:
    """Report the file and the reason if a checkpoint cannot be written. Megatron keeps only the error's type."""

    @replace(filesystem_async.FileSystemWriterAsync, "write_preloaded_data")
    def write(stock: Any, *arguments: Any, **options: Any) -> Any:
        _, error, *_ = output = stock(*arguments, **options)
        if not isinstance(error, Exception) or options["results_queue"] is not None:
            return output  # it was written, or this is a thread of Megatron's that has to finish
        while not isinstance(error, OSError) and error.__context__ is not None:
            error = error.__context__  # PyTorch's error hides the cause
        raise RuntimeError(f"{options['write_bucket'][0]}: {error}") from error
