"""Test that changed bytes of a checkpoint are found on loading, and that whole checkpoints are not overwritten."""

import io
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.serialization import config

from megatron.remoe.start.checkpoint_files import TRACKER
from megatron.remoe.start.checkpoint_index import BrokenCheckpointError, read_index
from megatron.remoe.start.stored_sums import check_stored_sums
from tests.checkpoints import Saved, flip, tensors, training, truncate
from tests.trainings import records, run

WEIGHT = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FLIPS = int(os.environ.get("REMOE_FLIPS", "100"))


def place(folder: Path, name: str) -> tuple[Path, int, int]:
    """Return the file, offset and length of a tensor or object."""
    entry = next(entry for key, entry in read_index(folder).storage_data.items() if key.fqn.startswith(name))
    return folder / entry.relative_path, entry.offset, entry.length


def flip_in(folder: Path, name: str) -> None:
    path, offset, length = place(folder, name)
    flip(path, offset + length // 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: truncate(tensors(folder)),
        lambda folder: flip_in(folder, WEIGHT),
        pytest.param(lambda folder: flip_in(folder, "optimizer.state.exp_avg_sq"), marks=pytest.mark.bulk),
        pytest.param(lambda folder: flip_in(folder, "rng_state"), marks=pytest.mark.bulk),
        lambda folder: flip_in(folder, "common_state"),
    ],
    ids=["truncated", "weight", "optimizer", "random state", "settings"],
)
def test_the_entry_goes_back_and_ends_the_same(spoil, saved: Saved, data: Path, uninterrupted: Saved) -> None:
    spoil(saved[6])
    output = run(training(data, saved.root))
    assert str(saved[6]) in output and "Going back to iteration 4" in output
    assert list(records(output)) == [5, 6]
    uninterrupted.assert_same_weights(saved, 6)


@pytest.mark.parametrize(
    "more",
    [
        ["--ckpt-fully-parallel-load"],
        *(pytest.param(more, marks=pytest.mark.bulk) for more in ([], ["--ckpt-assume-constant-structure"])),
    ],
)
def test_one_rank_that_finds_it_takes_the_others_along(more: list[str], data: Path, tmp_path: Path) -> None:
    words = training(data, tmp_path, "--expert-model-parallel-size", "2", *more)
    run(words, processes=2)
    flip(tmp_path / "iter_0000006" / "__1_0.distcp")
    output = run(words, processes=2)
    assert output.count("Going back to iteration 4") == 1 and list(records(output)) == [5, 6]


def test_two_damaged_iterations_lead_back_to_the_one_before(saved: Saved, data: Path) -> None:
    """The truncated file is found before the start, and the flipped bit by its checksum while it is loaded."""
    truncate(tensors(saved[6]))
    flip_in(saved[4], WEIGHT)
    output = run(training(data, saved.root))
    assert "Going back to iteration 2" in output and list(records(output)) == [3, 4, 5, 6]


def test_two_damaged_iterations_of_another_model_lead_back_too(saved: Saved, data: Path, tmp_path: Path) -> None:
    truncate(tensors(saved[6]))
    flip_in(saved[4], WEIGHT)
    output = run(training(data, tmp_path / "new", "--pretrained-checkpoint", str(saved.root)))
    assert f"--pretrained-checkpoint {saved.root}: {saved[4]}" in output and "Going back to iteration 2" in output
    assert list(records(output)) == [1, 2, 3, 4, 5, 6]


def test_an_iteration_that_was_asked_for_is_refused(saved: Saved, data: Path) -> None:
    flip_in(saved[4], WEIGHT)
    output = run(training(data, saved.root, "--ckpt-step", "4"), expect=1)
    assert "REMOE-E402" in output and "Iteration 2 " in output and "Traceback" not in output


def test_megatrons_own_hashes_lead_back_too(data: Path, tmp_path: Path) -> None:
    words = training(data, tmp_path, "--verify-integrity")
    run(words)
    metadata = tmp_path / "iter_0000006" / "metadata.json"
    metadata.write_text(metadata.read_text() + " ")  # our checksums do not cover this file
    assert "Going back to iteration 4" in run(words)


def test_one_file_per_rank(data: Path, tmp_path: Path) -> None:
    words = training(data, tmp_path, "--ckpt-format", "torch")
    run(words)
    file = next(tmp_path.glob("iter_0000006/mp_rank_00/*.pt"))

    def flip_from_a_tensors_start(byte: int) -> None:
        record = next(part for part in zipfile.ZipFile(file).infolist() if "/data/" in part.filename)
        flip(file, record.header_offset + byte)

    for spoil in (
        lambda: truncate(file),
        lambda: flip_from_a_tensors_start(0),  # before its values
        lambda: flip_from_a_tensors_start(1000),  # among them
    ):
        spoil()
        output = run(words)
        assert str(file) in output and "Going back to iteration 4" in output and list(records(output)) == [5, 6]
        assert zipfile.ZipFile(file).testzip() is None, "it was overwritten"
    longer = run([*words, "--train-iters", "8", "--lr-decay-iters", "6"])
    assert list(records(longer)) == [7, 8]


@pytest.mark.parametrize("name", [WEIGHT, "decoder.final_layernorm", "rng_state"])
def test_no_flipped_bit_changes_what_is_read(name: str, saved: Saved, tmp_path: Path) -> None:
    """Each flip is found by its checksum, makes PyTorch raise an error, or changes nothing."""
    path, offset, length = place(saved[6], name)
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(length)
    chance, copy, found = random.Random(2), tmp_path / "copy", 0
    right = read(content)
    for _ in range(FLIPS):
        bit, damaged = chance.randrange(8 * length), bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        copy.write_bytes(damaged)
        try:
            check_stored_sums(copy, [(0, length)])
            assert read(bytes(damaged)) in (right, None), bit
        except BrokenCheckpointError as error:
            assert str(copy) in str(error)
            found += 1
    print(f"{found} of {FLIPS} flips found by their sum")
    assert found


def read(content: bytes) -> bytes | None:
    """Return the bytes of the tensor or object in an archive, or None if PyTorch cannot read it."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        return b"".join(reader.get_record(name) for name in ("data.pkl", "data/0") if reader.has_record(name))
    except RuntimeError:
        return None


def test_files_without_sums_are_not_checked(tmp_path: Path) -> None:
    with config.patch("save.compute_crc32", False):
        torch.save(torch.ones(9), tmp_path / "a.pt")
    check_stored_sums(tmp_path / "a.pt", [(0, (tmp_path / "a.pt").stat().st_size)])


def test_whole_checkpoints_are_not_overwritten_by_another_start(saved: Saved, data: Path, tmp_path: Path) -> None:
    words, base = training(data, saved.root), saved.copy(tmp_path / "base")
    at = words.index("--load")
    del words[at : at + 2]
    for iteration in (4, 6):
        shutil.rmtree(base[iteration])
    (base.root / TRACKER).write_text("2")
    before = {path: path.read_bytes() for path in saved.root.rglob("*") if path.is_file()}
    for start in (
        [],
        ["--load", str(base.root)],
        *(["--finetune", "--load", str(root)] for root in (base.root, saved.root)),
    ):
        assert "REMOE-E407" in run([*words, *start], expect=2)
    assert {path: path.read_bytes() for path in before} == before
    back = run(training(data, saved.root, "--ckpt-step", "4"))
    assert f"--save {saved.root}: holds iteration 6" in back and list(records(back)) == [5, 6]
    for iteration in (2, 4, 6):
        shutil.rmtree(saved[iteration])
    assert list(records(run([*words, "--load", str(base.root)]))) == [3, 4, 5, 6]


def test_one_command_starts_from_a_model_and_resumes(saved: Saved, data: Path, tmp_path: Path) -> None:
    words = training(data, tmp_path / "new", "--pretrained-checkpoint", str(saved.root))
    assert list(records(run([*words, "--exit-interval", "4"]))) == [1, 2, 3, 4]
    assert list(records(run(words))) == [5, 6]
