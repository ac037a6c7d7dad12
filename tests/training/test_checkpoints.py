"""Checkpoints that are not whole, and trainings that are killed: nothing is lost, and what was lost is told."""

import os
import pickle
import random
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.remoe.preflight.checkpoint_files import (
    TRACKER,
    BrokenCheckpointError,
    check_is_whole,
    choose_checkpoint,
    newest_whole,
    read_index,
    saved_iterations,
)
from tests.trainings import TINY, records, run, start, weights
from tools.common.tiny_model import RELU

KILLS = int(os.environ.get("REMOE_KILLS", "3"))
ITERATIONS = 12 + 10 * KILLS


def training(data: Path, folder: Path, *more: str) -> list[str]:
    saving = ["--save", str(folder), "--load", str(folder), "--save-interval", "2", "--train-iters", str(ITERATIONS)]
    return [*TINY, *RELU, "--data-path", str(data), *saving, *more]


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training's checkpoints and output."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(training(data, folder))


@pytest.fixture
def saved(uninterrupted: tuple[Path, str], tmp_path: Path) -> Path:
    """Its last three checkpoints, to be damaged."""
    source, folder = uninterrupted[0], tmp_path / "checkpoints"
    folder.mkdir()
    for iteration in saved_iterations(source)[:3]:
        shutil.copytree(source / f"iter_{iteration:07d}", folder / f"iter_{iteration:07d}")
    shutil.copy(source / TRACKER, folder)
    return folder


def last(folder: Path, back: int = 0) -> Path:
    return folder / f"iter_{ITERATIONS - 2 * back:07d}"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def chosen(folder: Path, step: int | None = None) -> int | None:
    args = Namespace(load=str(folder), pretrained_checkpoint=None, ckpt_step=step, rank=0)
    choose_checkpoint(args)
    return args.ckpt_step


def tensors(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.distcp"))))


DAMAGES = {
    "truncated tensors": (lambda folder: truncate(tensors(folder)), "it is truncated"),
    "missing tensors": (lambda folder: tensors(folder).unlink(), "is missing"),
    "missing index": (lambda folder: (folder / ".metadata").unlink(), "saving was cut off"),
    "truncated index": (lambda folder: truncate(folder / ".metadata"), "cannot be read"),
    "empty index": (lambda folder: os.truncate(folder / ".metadata", 0), "cannot be read"),
    "missing last file": (lambda folder: (folder / "metadata.json").unlink(), "saving was cut off"),
    "empty last file": (lambda folder: os.truncate(folder / "metadata.json", 0), "saving was cut off"),
    "missing folder": (shutil.rmtree, "saving was cut off"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_goes_back_to_the_newest_whole_checkpoint(damage: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = DAMAGES[damage]
    assert chosen(saved) is None, "whole: Megatron's own choice stands"
    spoil(last(saved))
    assert chosen(saved) == ITERATIONS - 2
    told = capsys.readouterr().err
    assert message in told and str(last(saved)) in told and f"Going back to iteration {ITERATIONS - 2}" in told
    with pytest.raises(
        BrokenCheckpointError, match=f"--ckpt-step {ITERATIONS}: .* Iteration {ITERATIONS - 2} is whole"
    ):
        chosen(saved, step=ITERATIONS)
    spoil(last(saved, back=1))
    assert chosen(saved) == ITERATIONS - 4
    spoil(last(saved, back=2))
    with pytest.raises(BrokenCheckpointError, match="No other checkpoint there is whole"):
        chosen(saved)


@pytest.mark.parametrize("content", ["", "12a", "\x00\x00"])
def test_tracker_that_was_cut_off(content: str, saved: Path) -> None:
    tracker = saved / TRACKER
    tracker.write_text(content)
    assert chosen(saved) == ITERATIONS
    assert tracker.read_text() == str(ITERATIONS)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_index_is_not_executed(saved: Path) -> None:
    (last(saved) / ".metadata").write_bytes(pickle.dumps(Malicious(saved / "executed")))
    with pytest.raises(BrokenCheckpointError, match="posix.mkdir, which no checkpoint's index does"):
        check_is_whole(last(saved))
    assert not (saved / "executed").exists()
    assert newest_whole(saved) == ITERATIONS - 2


@pytest.mark.parametrize("name", ["os.mkdir", "FileSystemWriter", "pickle.loads"])
def test_names_in_an_index_lead_nowhere_else(name: str, saved: Path) -> None:
    """What checkpoint modules import, and those of their own classes that do more than hold values."""
    operations = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(word)]) + word.encode() for word in ("torch.distributed.checkpoint.filesystem", name)
    )
    operations += b"\x93\x8c" + bytes([len(str(saved / "x"))]) + str(saved / "x").encode() + b"\x85R."
    (last(saved) / ".metadata").write_bytes(operations)
    with pytest.raises(BrokenCheckpointError, match=f"filesystem.{name}, which no checkpoint's index does"):
        check_is_whole(last(saved))
    assert not (saved / "x").exists()


@pytest.mark.parametrize(
    ("name", "code", "more"),
    [("common_state", 2, []), ("common_state", 2, ["--use-checkpoint-args"]), ("rng_state", 1, [])],
)
def test_objects_are_not_executed(name: str, code: int, more: list[str], saved: Path, data: Path) -> None:
    index = read_index(last(saved)).storage_data
    entry = next(entry for key, entry in index.items() if key.fqn.startswith(name))
    code_to_run = pickle.dumps(Malicious(saved / "executed"))
    assert len(code_to_run) <= entry.length
    with (last(saved) / entry.relative_path).open("r+b") as file:
        file.seek(entry.offset)
        file.write(code_to_run)
    output = run(training(data, saved, *more), expect=code)
    assert not (saved / "executed").exists()
    message = output[output.rindex("pretrain_gpt.py: error: ") :]
    assert "--ckpt-step" in message and len(message) < 1000 and message.count("\n") <= 3, message


def test_pretrained_checkpoint_is_looked_at_too(saved: Path, tmp_path: Path) -> None:
    """Where there is nothing under --load yet; weights without an iteration have none to go back to."""
    release = tmp_path / "release"
    shutil.copytree(last(saved), release / "release")
    (release / TRACKER).write_text("release")
    args = Namespace(load=str(tmp_path / "new"), pretrained_checkpoint=str(release), ckpt_step=None, rank=0)
    choose_checkpoint(args)
    truncate(tensors(release / "release"))
    with pytest.raises(BrokenCheckpointError, match="--pretrained-checkpoint .* it is truncated. No other"):
        choose_checkpoint(args)
    args.load = str(saved)
    choose_checkpoint(args)
    assert args.ckpt_step is None


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert chosen(tmp_path) is None and chosen(tmp_path / "nowhere") is None


def test_entry_goes_back_and_ends_the_same(saved: Path, data: Path, uninterrupted: tuple[Path, str]) -> None:
    truncate(tensors(last(saved)))
    output = run(training(data, saved))
    assert f"Going back to iteration {ITERATIONS - 2}" in output
    assert list(records(output)) == [ITERATIONS - 1, ITERATIONS]
    same_weights(uninterrupted[0], saved)


def test_changed_bytes_are_found_with_integrity(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hashed"
    run(training(data, folder, "--verify-integrity", "--exit-interval", "2"))
    file = tensors(folder / "iter_0000002")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    output = run(training(data, folder, "--verify-integrity"), expect=1)
    message = output[output.rindex("pretrain_gpt.py: error: ") :]
    assert file.name in message and "--ckpt-step" in message and message.count("\n") <= 3, message


def test_entry_refuses_where_nothing_is_whole(saved: Path, data: Path) -> None:
    for back in range(3):
        truncate(tensors(last(saved, back)))
    output = run(training(data, saved), expect=2)
    assert "No other checkpoint there is whole" in output and "Traceback" not in output


def same_weights(expected: Path, found: Path) -> None:
    right, mine = weights(expected, ITERATIONS), weights(found, ITERATIONS)
    assert right.keys() == mine.keys()
    for key in right:
        assert torch.equal(right[key], mine[key]), key


@pytest.mark.timeout(120 + 60 * KILLS)
def test_killed_at_any_moment_it_ends_the_same(data: Path, tmp_path: Path, uninterrupted: tuple[Path, str]) -> None:
    """SIGKILL at random moments, every other one while a checkpoint is written; REMOE_KILLS=20 for twenty."""
    chance, folder, killed, seen = random.Random(1), tmp_path / "checkpoints", [], {}
    while True:
        process = start(training(data, folder), PYTHONUNBUFFERED="1")
        assert process.stdout is not None
        doomed = len(killed) < KILLS
        moment = ("step", "save", "start", "save")[len(killed) % 4]
        if doomed and moment == "start":
            time.sleep(chance.uniform(0.0, 5.0))
            process.kill()
        lines, trigger = [], chance.choice([1, 2, 3, 4])  # the step or the save that is the last one
        for line in process.stdout:
            lines.append(line)
            trigger -= {"step": "] iteration ", "save": " saving checkpoint at iteration "}.get(moment, "\0") in line
            if doomed and trigger == 0:
                time.sleep(chance.uniform(0.0, 0.2))
                process.kill()
                break
        process.stdout.close()
        code = process.wait()
        seen |= records("".join(lines))
        if code == 0:
            break
        assert code == -signal.SIGKILL, "".join(lines)[-3000:]
        killed.append(f"{moment} {max(seen, default=0)}")
    print(f"{len(killed)} kills (last iteration in the log): {', '.join(killed)}")
    assert len(killed) == KILLS
    same_weights(uninterrupted[0], folder)
    right = records(uninterrupted[1])
    assert seen[ITERATIONS]["lm loss"] == right[ITERATIONS]["lm loss"]
    assert [seen[i]["l1 coefficient"] for i in sorted(seen)] == [right[i]["l1 coefficient"] for i in sorted(seen)]
