"""Checkpoints that are not whole, and trainings that are killed: nothing is lost, and what was lost is told."""

import io
import os
import pickle
import random
import shutil
import signal
import time
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron.remoe.preflight.checkpoint_files import (
    TRACKER,
    check_is_whole,
    choose_checkpoint,
    newest_whole,
    saved_iterations,
)
from megatron.remoe.preflight.checkpoint_index import INDEX, INDEX_SUM, BrokenCheckpointError, read_index
from tests.trainings import ENTRY, TINY, records, run, start, weights
from tools.common.tiny_model import RELU

KILLS = int(os.environ.get("REMOE_KILLS", "3"))
FLIPS = int(os.environ.get("REMOE_FLIPS", "100"))
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


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def chosen(folder: Path, step: int | None = None) -> int | None:
    """The --ckpt-step after the choice; None where Megatron's own choice stands."""
    args = Namespace(load=str(folder), pretrained_checkpoint=None, ckpt_step=step, rank=0)
    resume = choose_checkpoint(args)
    if resume is not None:
        resume.apply(args)
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
    "flipped bit in the index": (lambda folder: flip(folder / ".metadata"), "has changed since it was saved"),
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


@pytest.mark.parametrize("content", ["", "12a", "\x00\x00", "-1", "9" * 30, "loop", None])
def test_tracker_that_is_damaged_or_missing_is_mended(content: str | None, saved: Path) -> None:
    tracker = saved / TRACKER
    tracker.unlink()
    if content == "loop":
        tracker.symlink_to(tracker.name)
    elif content is not None:
        tracker.write_text(content)
    assert chosen(saved) == ITERATIONS
    assert tracker.read_text() == str(ITERATIONS)
    assert chosen(saved) is None, "now Megatron's own choice stands"


def test_a_first_save_that_was_cut_off_is_no_lost_tracker(saved: Path) -> None:
    (saved / TRACKER).unlink()
    for back in range(3):
        truncate(tensors(last(saved, back)))
    with pytest.raises(BrokenCheckpointError, match="No other checkpoint there is whole"):
        chosen(saved)
    for back in range(2):
        shutil.rmtree(last(saved, back))
    assert chosen(saved) is None and not (saved / TRACKER).exists()


def test_what_is_no_tracker_and_no_iteration(saved: Path) -> None:
    for step in (-1, 0):
        with pytest.raises(BrokenCheckpointError, match=f"--ckpt-step {step}"):
            chosen(saved, step)
    blocking = saved / "iter_0099999"
    blocking.touch()
    with pytest.raises(BrokenCheckpointError, match=blocking.name):
        chosen(saved)
    blocking.unlink()
    (saved / TRACKER).unlink()
    (saved / TRACKER).mkdir()
    with pytest.raises(BrokenCheckpointError, match=f"{TRACKER} is a folder"):
        chosen(saved)


@pytest.mark.parametrize("has_sum", [True, False], ids=["with its checksum", "without"])
def test_flipped_bits_in_an_index(has_sum: bool, saved: Path) -> None:
    """With its checksum each one counts as damage; without, what is damaged ends in the one error and no other."""
    chance, index, found = random.Random(3), last(saved) / INDEX, 0
    content = index.read_bytes()
    if not has_sum:
        (last(saved) / INDEX_SUM).unlink()
    for _ in range(FLIPS):
        bit = chance.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        index.write_bytes(damaged)
        try:
            check_is_whole(last(saved))
        except BrokenCheckpointError:
            found += 1
    print(f"{found} of {FLIPS} flips found")
    assert found == FLIPS if has_sum else found > 0.8 * FLIPS


def change(index: Metadata, how: str) -> None:
    """What a damaged or malicious index may say that torch would believe."""
    kinds = index.state_dict_metadata
    key = next(key for key in index.storage_data if isinstance(kinds[key.fqn], BytesStorageMetadata))
    name, tensor = next((name, kind) for name, kind in kinds.items() if isinstance(kind, TensorStorageMetadata))
    entry, first = index.storage_data[key], tensor.chunks[0]
    match how:
        case "a file elsewhere":
            entry.relative_path = "../../secret"
        case "the folder above":
            entry.relative_path = ".."
        case "a negative offset":
            entry.offset = -1
        case "a length that is no number":
            entry.length = "long"
        case "an overlap":
            entry.length += 1
        case "more values than bytes":
            tensor.size = torch.Size([2 * n for n in tensor.size])
            first.sizes = tensor.size
        case "a part outside its tensor":
            first.offsets = torch.Size(tensor.size)
        case "a tensor that is not stored":
            del index.storage_data[MetadataIndex(name, first.offsets)]
        case "an object that is not stored":
            del index.storage_data[key]
        case "a kind of its own":
            kinds[name] = first


@pytest.mark.parametrize(
    "how",
    [
        *["a file elsewhere", "the folder above", "a negative offset", "a length that is no number", "an overlap"],
        *["more values than bytes", "a part outside its tensor", "a tensor that is not stored"],
        *["an object that is not stored", "a kind of its own"],
    ],
)
def test_an_index_that_contradicts_itself(how: str, saved: Path) -> None:
    (last(saved) / INDEX_SUM).unlink()
    index = read_index(last(saved))
    change(index, how)
    (last(saved) / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(BrokenCheckpointError, match=INDEX):
        read_index(last(saved))
    assert chosen(saved) == ITERATIONS - 2


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_index_is_not_executed(saved: Path) -> None:
    (last(saved) / INDEX_SUM).unlink()
    (last(saved) / INDEX).write_bytes(pickle.dumps(Malicious(saved / "executed")))
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
    (last(saved) / INDEX_SUM).unlink()
    (last(saved) / INDEX).write_bytes(operations)
    with pytest.raises(BrokenCheckpointError, match=f"filesystem.{name}, which no checkpoint's index does"):
        check_is_whole(last(saved))
    assert not (saved / "x").exists()


def put_code(folder: Path, name: str, marker: Path) -> None:
    """Put code that makes the marker where an object of the checkpoint is."""
    entry = next(entry for key, entry in read_index(folder).storage_data.items() if key.fqn.startswith(name))
    code = pickle.dumps(Malicious(marker))
    assert len(code) <= entry.length
    with (folder / entry.relative_path).open("r+b") as file:
        file.seek(entry.offset)
        file.write(code)


@pytest.mark.parametrize("more", [[], ["--use-checkpoint-args"]])
def test_settings_are_not_executed(more: list[str], saved: Path, data: Path) -> None:
    put_code(last(saved), "common_state", saved / "executed")
    output = run(training(data, saved, *more))
    assert not (saved / "executed").exists()
    assert f"Going back to iteration {ITERATIONS - 2}" in output


def test_objects_are_not_executed(saved: Path, data: Path) -> None:
    put_code(last(saved), "rng_state", saved / "executed")
    output = run(training(data, saved), expect=1)
    assert not (saved / "executed").exists()
    assert "Traceback" not in output and "REMOE-E405" in output
    message = output[output.rindex("pretrain_gpt.py: error: ") :]
    assert "--ckpt-step" in message and len(message) < 1000 and message.count("\n") <= 3, message


def test_pretrained_checkpoint_is_looked_at_too(saved: Path, tmp_path: Path) -> None:
    """Where there is nothing under --load yet; weights without an iteration have none to go back to."""
    release = tmp_path / "release"
    shutil.copytree(last(saved), release / "release")
    (release / TRACKER).write_text("release")
    args = Namespace(load=str(tmp_path / "new"), pretrained_checkpoint=str(release), ckpt_step=None, rank=0)
    resume = choose_checkpoint(args)
    assert resume is not None and resume.folder == release / "release" and resume.step is None
    truncate(tensors(release / "release"))
    with pytest.raises(BrokenCheckpointError, match="--pretrained-checkpoint .* it is truncated. No other"):
        choose_checkpoint(args)
    args.load = str(saved)
    resume = choose_checkpoint(args)
    assert resume is not None and resume.folder == last(saved) and resume.step is None


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
    flip(file)
    output = run(training(data, folder, "--verify-integrity"), expect=1)
    message = output[output.rindex("pretrain_gpt.py: error: ") :]
    assert file.name in message and "--ckpt-step" in message and message.count("\n") <= 3, message


def one_file_per_rank(data: Path, folder: Path, *more: str) -> list[str]:
    return training(data, folder, "--ckpt-format", "torch", *more)


def test_checkpoints_of_one_file_per_rank(data: Path, tmp_path: Path) -> None:
    """They go on, for longer too; a damaged one is no success."""
    folder = tmp_path / "torch"
    run(one_file_per_rank(data, folder, "--train-iters", "4", "--lr-decay-iters", "4"))
    longer = one_file_per_rank(data, folder, "--train-iters", "6", "--lr-decay-iters", "4")
    assert list(records(run(longer))) == [5, 6]
    file = next(folder.glob("iter_0000006/mp_rank_00/*.pt"))
    whole = file.read_bytes()
    truncate(file)
    assert "Going back to iteration 4" in run(longer)
    whole_again = file.read_bytes()
    assert len(whole_again) == len(whole), "it was overwritten"
    damaged = bytearray(whole)
    part = next(part for part in zipfile.ZipFile(io.BytesIO(whole)).infolist() if "/data/" in part.filename)
    damaged[part.header_offset] ^= 1  # before a tensor's values, which are read in loading alone
    file.write_bytes(damaged)
    output = run(longer, expect=1)
    message = output[output.rindex("pretrain_gpt.py: error: ") :]
    assert f"--load {folder}" in message and "--ckpt-step" in message, message
    assert "Traceback" not in output


def test_what_is_saved_is_on_the_disk_before_it_is_reported(data: Path, tmp_path: Path) -> None:
    """In the order of the system's calls: each file, its folder, the tracker, and only then the message."""
    watch, folder, seen = tmp_path / "watch.py", tmp_path / "checkpoints", tmp_path / "seen"
    watch.write_text(
        "import os, runpy, sys\n"
        "fsync, replace, seen = os.fsync, os.replace, open(sys.argv.pop(1), 'w', buffering=1)\n"
        "def watched(number):\n"
        "    print('sync', os.readlink(f'/proc/self/fd/{number}'), file=seen)\n"
        "    fsync(number)\n"
        "os.fsync = watched\n"
        "import builtins\n"
        "write = builtins.print\n"
        "def told(*words, **options):\n"
        "    if 'successfully saved' in str(words): write('told', file=seen)\n"
        "    write(*words, **options)\n"
        "builtins.print = told\n"
        f"runpy.run_path({str(ENTRY)!r}, run_name='__main__')\n"
    )
    run([str(seen), *training(data, folder, "--exit-interval", "2")], script=watch)
    events = seen.read_text().splitlines()
    before = [Path(event.removeprefix("sync ")) for event in events[: events.index("told")]]
    saved = folder / "iter_0000002"
    for path in (*saved.iterdir(), saved, folder):
        assert path in before or path.with_name(f"{path.name}.new") in before, path
    assert before[-2:] == [folder / f"{TRACKER}.new", folder]


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
