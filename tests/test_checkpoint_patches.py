"""Test that Megatron still needs each patch of saving and loading; a test fails if a release does not."""

import contextlib
import inspect
import io
import queue
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.remoe import patches
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError
from megatron.remoe.start.stored_sums import check_stored_sums
from megatron.training import checkpointing, training
from tests.checkpoints import Malicious
from tests.trainings import in_another_process


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def planner(monkeypatch: pytest.MonkeyPatch) -> tuple[MCoreLoadPlanner, SimpleNamespace, dict[str, object]]:
    """Return a planner that loads the object "rng_state", the object's item, and the dictionary to load it into."""
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="rng_state"))
    found: dict[str, object] = {}
    planner = MCoreLoadPlanner.__new__(MCoreLoadPlanner)
    planner.state_dict, planner.flatten_state_dict = found, False
    return planner, item, found


def test_megatron_still_executes_what_a_checkpoint_holds(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_bytes = getattr(MCoreLoadPlanner.load_bytes, "__wrapped__", MCoreLoadPlanner.load_bytes)
    monkeypatch.setattr(MCoreLoadPlanner, "load_bytes", load_bytes)
    loader, item, _ = planner(monkeypatch)
    loader.load_bytes(item, saved(Malicious(tmp_path / "made by stock")))
    assert (tmp_path / "made by stock").is_dir(), "the released Megatron no longer needs the patch"

    patches.checkpoints.load_objects_unexecuted()
    with pytest.raises(BrokenCheckpointError, match="rng_state in the checkpoint refers to .*mkdir"):
        loader.load_bytes(item, saved(Malicious(tmp_path / "made by patched")))
    assert not (tmp_path / "made by patched").exists()
    whole = saved({"step": torch.ones(3)}).getvalue()
    with pytest.raises(BrokenCheckpointError, match="rng_state in the checkpoint is damaged") as damaged:
        loader.load_bytes(item, io.BytesIO(whole[: len(whole) // 2]))
    assert "run code" not in str(damaged.value), "two reasons, two messages"
    loader.load_bytes(item, io.BytesIO(whole))


def test_pytorch_still_loads_changed_bytes(tmp_path: Path) -> None:
    content = bytearray(saved(torch.ones(1000)).getvalue())
    content[content.index(torch.ones(9).numpy().tobytes()) + 2] ^= 1
    assert not torch.equal(torch.load(io.BytesIO(content)), torch.ones(1000)), "PyTorch no longer needs the patch"
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=r"a\.pt"):
        check_stored_sums(tmp_path / "a.pt", [(0, len(content))])


def why_writing_failed(tmp_path) -> str:
    """Write a shard below a file; return the error that reaches the training."""
    (tmp_path / "file").touch(exist_ok=True)
    place, results = tmp_path / "file" / "shard", queue.Queue()
    with contextlib.suppress(RuntimeError):
        filesystem_async.FileSystemWriterAsync.write_preloaded_data_multithread(
            [], False, 0, [(str(place), place.name, ([], []))], results
        )
    return repr(results.get_nowait())


def test_megatron_still_loses_why_writing_failed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = filesystem_async.FileSystemWriterAsync
    stock = getattr(writer.write_preloaded_data, "__wrapped__", writer.write_preloaded_data)
    monkeypatch.setattr(writer, "write_preloaded_data", staticmethod(stock))
    assert "Not a directory" not in why_writing_failed(tmp_path)
    patches.checkpoints.report_write_errors()
    assert f"{tmp_path / 'file' / 'shard'}: " in (why := why_writing_failed(tmp_path)) and "Not a directory" in why


@pytest.mark.parametrize("patched", [False, True])
def test_the_queue_of_written_shards_does_not_outlive_sigterm_by_itself(patched: bool, tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes of a step. Without the patch, the following save has no queue."""
    lines = f"""
import os, signal, time
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.remoe import patches
{"patches.checkpoints.keep_saving_possible()" if patched else ""}
shards = filesystem_async.get_write_results_queue()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for child in __import__("psutil").Process().children():
    child.terminate()
time.sleep(0.5)
shards.put(1)
print("kept", shards.get())
"""
    assert ("kept 1" in in_another_process(lines, tmp_path, expect=int(not patched))) is patched


def test_megatron_still_ends_a_failed_load_in_success_and_waits_for_tensors_alone(monkeypatch) -> None:
    assert "sys.exit()" in inspect.getsource(checkpointing._load_base_checkpoint)
    assert "fsync" not in inspect.getsource(checkpointing.save_checkpoint) + inspect.getsource(serialization)
    monkeypatch.setattr(training, "load_checkpoint", sys.exit)
    args = SimpleNamespace(load="run", ckpt_step=1, pretrained_checkpoint=None, use_megatron_fsdp=False)
    monkeypatch.setattr(patches.checkpoints, "get_args", lambda: args)
    patches.checkpoints.check_loaded_weights()
    with pytest.raises(BrokenCheckpointError, match="--load run"):
        training.load_checkpoint([])
