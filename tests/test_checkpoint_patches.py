"""Test that Megatron still needs each patch of saving and loading; a test fails if a release does not."""

import contextlib
import inspect
import io
import os
import queue
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.remoe import patches
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError
from megatron.training import checkpointing, training
from tests.checkpoints import Calls
from tests.test_patches import stock
from tests.training_runs import in_another_process


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_megatron_still_executes_what_a_checkpoint_holds(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock(monkeypatch, DefaultLoadPlanner, "load_bytes")
    loader, item = MCoreLoadPlanner.__new__(MCoreLoadPlanner), SimpleNamespace()
    loader.state_dict, loader.flatten_state_dict = {}, False
    item.dest_index = SimpleNamespace(fqn="rng_state")
    loader.load_bytes(item, saved(Calls(os.mkdir, str(tmp_path / "made by stock"))))
    assert (tmp_path / "made by stock").is_dir(), "the released Megatron no longer needs the patch"

    patches.checkpoints.refuse_unsafe_objects()
    with pytest.raises(BrokenCheckpointError, match="rng_state in the checkpoint refers to .*mkdir"):
        loader.load_bytes(item, saved(Calls(os.mkdir, str(tmp_path / "made by patched"))))
    assert not (tmp_path / "made by patched").exists()
    whole = saved({"step": torch.ones(3)}).getvalue()
    with pytest.raises(BrokenCheckpointError, match="rng_state in the checkpoint is damaged") as damaged:
        loader.load_bytes(item, io.BytesIO(whole[: len(whole) // 2]))
    assert "run code" not in str(damaged.value), "two reasons, two messages"
    loader.load_bytes(item, io.BytesIO(whole))


def why_writing_failed(tmp_path) -> str:
    """Try to write a shard below a regular file; return the error that reaches the training run."""
    (tmp_path / "file").touch(exist_ok=True)
    place, results = tmp_path / "file" / "shard", queue.Queue()
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data_multithread
    with contextlib.suppress(RuntimeError):
        write([], False, 0, [(str(place), place.name, ([], []))], results)
    return repr(results.get_nowait())


def test_megatron_still_loses_why_writing_failed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = filesystem_async.FileSystemWriterAsync
    own = stock(monkeypatch, writer, "write_preloaded_data")
    monkeypatch.setattr(writer, "write_preloaded_data", staticmethod(own))
    assert "Not a directory" not in why_writing_failed(tmp_path)
    patches.checkpoints.report_write_errors()
    assert f"{tmp_path / 'file' / 'shard'}: " in (why := why_writing_failed(tmp_path)) and "Not a directory" in why


@pytest.mark.parametrize("patched", [False, True])
def test_the_queue_of_written_shards_does_not_outlive_sigterm_by_itself(patched: bool, tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes of a step. Without the patch, the following save has no queue."""
    lines = f"""
import os, signal, time
if __name__ == "__main__":  # the queue's process imports this file
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.remoe import patches
    {"patches.checkpoints.protect_saving_from_sigterm()" if patched else "pass"}
    shards = filesystem_async.get_write_results_queue()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for child in __import__("psutil").Process().children():
        child.terminate()
    time.sleep(0.5)
    shards.put(1)
    print("kept", shards.get())
"""
    output = in_another_process(lines, tmp_path, expect=int(not patched))
    assert ("kept 1" in output) is patched and ("ConnectionRefusedError" in output) is not patched


@pytest.mark.parametrize(("patched", "start", "end", "code"), [
    (False, "pass", "os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    (True, "pass", "os.kill(os.getpid(), signal.SIGTERM)", 1),
    (True, "handler.__enter__()", "os.kill(os.getpid(), signal.SIGTERM); assert handler._signal_received", 0),
    (True, "pass", "pass", 0),
])  # fmt: skip
def test_the_process_of_async_saves_ends_with_its_parent_only(patched, start, end: str, code: int, tmp_path) -> None:
    """With the patch, the process survives Slurm's SIGTERM, but not the end of its parent, whose handler stays."""
    lines = f"""
import multiprocessing, os, signal, time
from megatron.remoe import patches
from megatron.training import dist_signal_handler, initialize
handler = dist_signal_handler.DistributedSignalHandler()
if __name__ == "__main__":  # the worker imports this file
    worker = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(100,), daemon=True)
    {start}
    initialize.init_persistent_async_worker = worker.start  # Megatron's own needs a GPU
    {"patches.checkpoints.protect_saving_from_sigterm()" if patched else "pass"}
    initialize.init_persistent_async_worker()
    worker.terminate()
    worker.join({3 if patched else 30})
    print("pid", worker.pid if worker.is_alive() else 0)
    os.sys.stdout.flush()
    {end}
"""
    pid = int(in_another_process(lines, tmp_path, expect=code).split()[-1])
    assert (pid > 0) is patched
    if patched:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(timeout=10)


def test_megatron_still_ends_a_failed_load_in_success(monkeypatch) -> None:
    assert "sys.exit()" in inspect.getsource(checkpointing._load_base_checkpoint)
    monkeypatch.setattr(training, "load_checkpoint", sys.exit)
    args = SimpleNamespace(resume_flag="--load", resume_folder="run", ckpt_step=1, verify_integrity=False)
    monkeypatch.setattr(patches.checkpoints, "get_args", lambda: args)
    patches.checkpoints.go_back_from_damage()
    with pytest.raises(BrokenCheckpointError, match="--load run"):
        training.load_checkpoint([])
