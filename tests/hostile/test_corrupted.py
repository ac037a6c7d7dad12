"""Damage one file of a run at random: the run reaches the same weights, or ends in one clear error."""

import argparse
import random
import socket
from pathlib import Path

import pytest

from megatron.remoe.files.errors import UsageError
from megatron.remoe.start.run_lock import HOLDER, LOCK, lock_save_folder
from tests.hostile.conftest import Noted
from tests.hostile.trials import SAVED, Trial, damage

FILES = {
    "index": [f"run/iter_{SAVED:07d}/.metadata"],
    "checksum of the index": [f"run/iter_{SAVED:07d}/.metadata.sha256"],
    "tensors": [f"run/iter_{SAVED:07d}/__*.distcp"],
    "last file of a checkpoint": [f"run/iter_{SAVED:07d}/metadata.json"],
    "tracker": ["run/latest_checkpointed_iteration.txt"],
    "metrics.jsonl": ["run/metrics.jsonl"],
    "data": ["text.bin"],
    "data's index": ["text.idx"],
    "index cache": ["text/cache/**/*.npy", "text/cache/**/*.txt"],
}
# Damage here may go unnoticed, because text has no checksum.
UNCHECKED = {"data", "index cache", "data's index"}
TIMES = 6
CASES = [(name, how, number) for name in FILES for how in ("flip", "cut", "zeros") for number in range(TIMES)]


@pytest.mark.bulk
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "how", "number"), CASES)
def test_damage_by_chance(name: str, how: str, number: int, trial: Trial, note: Noted) -> None:
    chance = random.Random(f"{name} {how} {number}")
    found = sorted(path for pattern in FILES[name] for path in trial.folder.glob(pattern))
    assert found, FILES[name]
    spoiled = chance.choice(found)
    damage(spoiled, chance, how)
    result = trial.resume()
    note("corrupted files", f"{result} ({name})", 1)
    assert result != "not noticed" or name in UNCHECKED, f"{spoiled.name}, {how}"


@pytest.mark.bulk
@pytest.mark.parametrize(("how", "number"), [(how, number) for how in ("flip", "cut", "zeros") for number in range(12)])
def test_damaged_locks(how: str, number: int, tmp_path: Path, note: Noted) -> None:
    """A dead training's damaged lock is taken over, or refused after the lease: 1 s here, 300 s in the program."""
    chance = random.Random(f"lock {how} {number}")
    fields = f"pid=999999\nhost={socket.gethostname()}\nmode=lease\ntoken=ab\nduration=1.0\n"
    (tmp_path / LOCK).write_text(f"filelock/2\n{fields}")
    (tmp_path / HOLDER).write_text("process 999999, started 2026-01-01 00:00:00 UTC")
    damage(tmp_path / LOCK, chance, how)
    damage(tmp_path / HOLDER, chance, how)
    try:
        with lock_save_folder(argparse.Namespace(rank=0, skip_train=False, save=str(tmp_path)), 1.0):
            result = "taken over"
    except UsageError as error:
        assert str(tmp_path / LOCK) in str(error) and "remove it" in str(error)
        result = "refused after the lease"
    note("corrupted files", f"{result} (lock)", 1)
