"""Hide code in the files of a checkpoint: neither a run nor a tool executes it."""

import argparse
import builtins
import contextlib
import functools
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.remoe.start.checkpoint_index import INDEX, BrokenCheckpointError, check_object, read_index
from tests.checkpoints import Calls, training
from tests.training_runs import run
from tools.models.export import main as export

NEWEST = "iter_0000002"


def by_name(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that calls a function by its dotted name, which may lead through a module's imports."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93(X" + len(argument).to_bytes(4, "little") + argument.encode() + b"tR."


# Each makes a folder of the given name when plain pickle reads it.
PICKLES: dict[str, Callable[[str], bytes]] = {
    "os.mkdir": lambda name: pickle.dumps(Calls(os.mkdir, name)),
    "protocol 0": lambda name: pickle.dumps(Calls(os.mkdir, name), protocol=0),
    "exec": lambda name: pickle.dumps(Calls(builtins.exec, f"__import__('os').mkdir({name!r})")),
    "partial": lambda name: pickle.dumps(Calls(functools.reduce, functools.partial(os.mkdir), [0o755], name)),
    "through a checkpoint's module": lambda name: by_name("torch.distributed.checkpoint.filesystem", "os.mkdir", name),
    "through torch": lambda name: by_name("torch.serialization", "os.mkdir", name),
    "in settings": lambda name: pickle.dumps({"args": argparse.Namespace(num_layers=Calls(os.mkdir, name))}),
}


def in_zip(content: bytes) -> bytes:
    """Return a file of torch.save whose pickle is `content`."""
    plain, changed = io.BytesIO(), io.BytesIO()
    torch.save({"args": 1}, plain)
    with zipfile.ZipFile(plain) as before, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as after:
        for name in before.namelist():
            after.writestr(name, content if name.endswith("data.pkl") else before.read(name))
    return changed.getvalue()


@pytest.mark.parametrize("name", PICKLES)
def test_index_and_objects(name: str, tmp_path: Path) -> None:
    """The readers refuse each pickle, which plain pickle executes."""
    marker = tmp_path / "executed"
    content = PICKLES[name](str(marker))
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(BrokenCheckpointError):
        read_index(tmp_path)
    with pytest.raises(BrokenCheckpointError):
        check_object("rng_state", io.BytesIO(in_zip(content)))
    assert not marker.exists()
    with contextlib.suppress(Exception):
        pickle.loads(content)
    assert marker.exists()


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(training(data, folder, "--exit-interval", "2"))
    return folder


def replace_object(root: Path, prefix: str, content: bytes) -> None:
    """Make the index point to `content` for the first object or tensor whose name starts with `prefix`."""
    index = pickle.loads((root / NEWEST / INDEX).read_bytes())
    entry = next(entry for key, entry in index.storage_data.items() if key.fqn.startswith(prefix))
    with (root / NEWEST / entry.relative_path).open("ab") as file:
        entry.offset, entry.length = file.tell(), file.write(in_zip(content))
    (root / NEWEST / INDEX).write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("target", ["index", "common_state/", "rng_state", "decoder.layers.mlp.router.relu_weight"])
def test_runs_and_tools(target: str, saved: Path, data: Path, tmp_path: Path, capsys) -> None:
    root, marker = Path(shutil.copytree(saved, tmp_path / "run")), tmp_path / "executed"
    content = PICKLES["os.mkdir"](str(marker))
    if target == "index":
        (root / NEWEST / INDEX).write_bytes(content)
    else:
        replace_object(root, target, content)
    # With this flag, Megatron reads the settings before it loads the rest.
    more = ["--use-checkpoint-args"] if target == "common_state/" else []
    output = run(training(data, root, *more), expect=None)
    assert "pretrain_gpt.py: error: " in output and ("REMOE-E4" in output) != target.endswith("weight")
    code = export(["--load", str(root), "--save", str(tmp_path / "out")])
    assert (code == 0) == (target == "rng_state"), "tools do not read the random state"
    assert not marker.exists()


def test_one_file_per_rank(data: Path, tmp_path: Path) -> None:
    words, marker = training(data, tmp_path / "run", "--ckpt-format", "torch"), tmp_path / "executed"
    run([*words, "--exit-interval", "2"])
    file = tmp_path / "run" / NEWEST / "mp_rank_00" / "model_optim_rng.pt"
    file.write_bytes(in_zip(PICKLES["os.mkdir"](str(marker))))
    assert "REMOE-E401" in run(words, expect=2) and not marker.exists()
