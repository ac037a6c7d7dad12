"""Load checkpoints without running code from them, check what was loaded, and save durably."""

import io
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.futures import Future

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, TorchDistLoadShardedStrategy
from megatron.core.rerun_state_machine import Call, Caller
from megatron.remoe.files.errors import UsageError
from megatron.remoe.files.files import sync, write_text
from megatron.remoe.patches.patch import patch, replace
from megatron.remoe.start.checkpoint_files import (
    RELEASE,
    TRACKER,
    go_back,
    iteration_folder,
    loaded_flag,
    wait_for_files,
)
from megatron.remoe.start.checkpoint_fit import check_is_finite
from megatron.remoe.start.checkpoint_index import (
    INDEX,
    INDEX_SUM,
    BrokenCheckpointError,
    check_object,
    index_sum,
    is_of_fsdp,
    read_index,
)
from megatron.remoe.start.stored_sums import check_part, check_stored_sums
from megatron.training import checkpointing, training
from megatron.training.global_vars import get_args

# Errors of PyTorch's archive reader; headers have no sums.
ARCHIVE_ERRORS = re.compile("PytorchStreamReader|inline_container|hasRecord")
ASYNC_FILE, TORCH_FILE = (f"core/dist_checkpointing/strategies/{name}.py" for name in ("filesystem_async", "torch"))


@patch(
    changes=f"{TORCH_FILE}: MCoreLoadPlanner.load_bytes",
    provides="protection from code in a checkpoint's objects",
    ends="load_bytes unpickles with weights_only=True",
)
def load_objects_unexecuted() -> None:
    """Refuse objects in a checkpoint that could run code; normally they are states of random number generators.

    PyTorch unpickles them without restriction, although Megatron has a list of the types that they consist of.
    """
    torch.serialization.add_safe_globals([Call, Caller])  # the list lacks these, which checkpoints after a NaN hold

    @replace(MCoreLoadPlanner, "load_bytes")
    def load_bytes(stock: Any, self: MCoreLoadPlanner, read_item: Any, value: io.BytesIO) -> None:
        check_object(read_item.dest_index.fqn, value)
        stock(self, read_item, value)


def _read_verified(reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
    """Read as PyTorch does, and compare everything with the stored sums in another thread."""
    places: dict[Path, set[tuple[int, int]]] = {}
    for item in plan.items:
        entry = reader.storage_data[item.storage_index]
        if not entry.transform_descriptors:  # a compressed entry is not an archive
            places.setdefault(Path(reader.path, entry.relative_path), set()).add((entry.offset, entry.length))
    with ThreadPoolExecutor(1) as thread:
        checks = [thread.submit(check_stored_sums, path, sorted(parts)) for path, parts in places.items()]
        try:
            return FileSystemReader.read_data(reader, plan, planner)
        except RuntimeError as error:
            if ARCHIVE_ERRORS.search(str(error)) is None:
                raise
            raise BrokenCheckpointError(f"{reader.path} holds a tensor that cannot be read") from error
        finally:
            for check in checks:
                check.result()  # this error names the file, and replaces an error of reading


class _VerifyingReader(FileSystemReader):
    read_data = _read_verified


@patch(
    changes=f"{TORCH_FILE}: FileSystemReader and TorchDistLoadShardedStrategy.load",
    provides="changed bits in a checkpoint's tensors are found",
    ends="PyTorch compares records with their CRC-32 when it loads, and Megatron lets ranks fail together",
)
def verify_loaded_bytes() -> None:
    """Detect bits that have changed since they were saved, and fail on all ranks.

    Ranks read different parts. If only one failed, the others would wait for it forever.
    """
    torch_dist.FileSystemReader = _VerifyingReader
    CachedMetadataFileSystemReader.read_data = _read_verified

    @replace(TorchDistLoadShardedStrategy, "load")
    def load(stock: Any, *arguments: Any, **options: Any) -> Any:
        with _fails_together():
            return stock(*arguments, **options)


@contextmanager
def _fails_together() -> Iterator[None]:
    """If ranks raise a UsageError, raise that of the first of them on all ranks."""
    mine: UsageError | None = None
    try:
        yield
    except UsageError as error:
        mine = error
    except CheckpointException as error:
        mine = _wrapped(error)
        if mine is None:
            raise
    errors = [mine]
    if torch.distributed.is_initialized():
        errors = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, mine)
    if first := next(filter(None, errors), None):
        raise first


def _wrapped(error: CheckpointException) -> BrokenCheckpointError | None:
    """Return our error if PyTorch has wrapped one, else None."""
    return next((found for found, _ in error.failures.values() if isinstance(found, BrokenCheckpointError)), None)


@patch(
    changes="training/training.py: load_checkpoint",
    provides="going back from a damaged checkpoint; errors for failed loads and NaN; the schedule with --no-load-optim",
    ends="Megatron has a hook after loading, no sys.exit() in checkpointing.py, and keeps the schedule",
)
def check_loaded_weights() -> None:
    """Go back to the previous complete iteration if bytes have changed, and refuse weights that are not finite.

    Megatron ends some failed loads with exit code 0; they become errors.
    """

    @replace(training, "load_checkpoint")
    def load(stock: Any, model: list[torch.nn.Module], *rest: Any, **options: Any) -> Any:
        args = get_args()
        asked = None if getattr(args, "is_going_back", False) else args.ckpt_step
        flag = loaded_flag(args)
        root = args.load if flag == "--load" else args.pretrained_checkpoint
        while True:
            folder = iteration_folder(Path(root), args.ckpt_step) if root else None
            try:
                if folder is not None:
                    _check_own_files(folder)
                loaded = stock(model, *rest, **options)
                break
            except SystemExit as stop:
                raise BrokenCheckpointError(
                    f"{flag} {root}: cannot be loaded, for the reason that Megatron prints above. If it is damaged, "
                    "give an earlier iteration with --ckpt-step."
                ) from stop
            except (BrokenCheckpointError, CheckpointingException, CheckpointException) as error:
                # All ranks read the common state and fail in the same way; PyTorch wraps these errors.
                found = (_wrapped(error) if isinstance(error, CheckpointException) else None) or error
                is_damage = getattr(found, "code", "") == BrokenCheckpointError.code
                if folder is None or not (is_damage or "integrity verification failed" in str(found)):
                    raise
                go_back(flag, folder, " ".join(str(found).split()), asked).apply(args)
        with _fails_together():
            for chunk in model:
                check_is_finite(f"{flag} {root}", chunk)
        if args.no_load_optim and not args.finetune and loaded[0] and len(rest) > 1 and rest[1] is not None:
            rest[1].step(args.consumed_train_samples)  # Megatron leaves the schedule of the learning rate at its start
        return loaded


def _check_own_files(folder: Path) -> None:
    """Check this rank's part of a checkpoint that is not torch_dist's; those are checked while they are read."""
    fsdp = get_args().use_megatron_fsdp and (folder / INDEX).is_file()
    if fsdp and is_of_fsdp(index := read_index(folder)):
        with _fails_together():
            check_part(folder, index, torch.distributed.get_rank(), torch.distributed.get_world_size())
    if not any(folder.glob("mp_rank_*")):
        return
    released = folder.name == RELEASE
    iteration = 0 if released else int(folder.name.removeprefix("iter_"))
    own = Path(checkpointing.get_checkpoint_name(str(folder.parent), iteration, released, return_base_dir=False))
    with _fails_together():
        for file in own.parent.glob("*.pt"):
            check_stored_sums(file, [(0, file.stat().st_size)])


class _Tracker(io.StringIO):
    """A tracker file that is written after everything it refers to is on the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def close(self) -> None:
        if self.closed:
            return
        name = self.getvalue().strip()
        super().close()
        folder = self._path.parent / (RELEASE if name == RELEASE else f"iter_{int(name):07d}")
        if (folder / INDEX).is_file():
            write_text(folder / INDEX_SUM, index_sum(folder))
            wait_for_files(folder)
        for path in (*folder.rglob("*"), folder):
            sync(path)
        write_text(self._path, name)


class _DurableStorage:
    """Megatron's access to files, except for the tracker."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def open(self, path: str, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "w" and os.path.basename(path) == TRACKER and "://" not in path:
            return _Tracker(Path(path))
        return self._stock.open(path, mode, *rest, **options)


@patch(
    changes="training/checkpointing.py: maybe_msc",
    provides="checkpoints that survive a power cut from the moment they are reported as saved",
    ends="save_checkpoint calls fsync for metadata.json, the folder and the tracker",
    for_saving=True,
)
def save_durably() -> None:
    """Write a checkpoint to the disk before it is reported as saved, with a checksum of its index.

    Megatron only waits for the tensors. After a power cut, small files and the tracker may be empty.
    """
    if not isinstance(checkpointing.maybe_msc, _DurableStorage):
        checkpointing.maybe_msc = _DurableStorage(checkpointing.maybe_msc)


@patch(
    changes=f"{ASYNC_FILE}: _results_queue",
    provides="the checkpoint that is saved at SIGTERM where the signal goes to all processes, as Slurm's does",
    ends="the queue's process ignores SIGTERM, or there is none",
    for_saving=True,
)
def keep_saving_possible() -> None:
    """Start the process that holds Megatron's queue of written shards so that it survives SIGTERM.

    Megatron starts it at the first save. Slurm sends SIGTERM to all processes, which ends it, so the save that
    --exit-signal-handler makes would fail. It ends with its parent, because it would keep the log's pipe open.
    """
    if filesystem_async._results_queue is None:
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


@patch(
    changes=f"{ASYNC_FILE}: FileSystemWriterAsync.write_preloaded_data",
    provides="the file and the reason where a checkpoint cannot be written",
    ends="the error of a failed write reaches the caller whole",
    for_saving=True,
)
def report_write_errors() -> None:
    """Report file and reason if part of a checkpoint cannot be written. Megatron keeps only the type of the error."""

    @replace(filesystem_async.FileSystemWriterAsync, "write_preloaded_data")
    def write(stock: Any, *arguments: Any, **options: Any) -> Any:
        _, error, *_ = output = stock(*arguments, **options)
        if not isinstance(error, Exception) or options["results_queue"] is not None:
            return output  # it was written, or this is a thread of Megatron's that has to finish
        while not isinstance(error, OSError) and error.__context__ is not None:
            error = error.__context__  # PyTorch's error hides the cause
        raise RuntimeError(f"{options['write_bucket'][0]}: {error}") from error
