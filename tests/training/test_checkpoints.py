"""Test which checkpoint a run starts from, and what it takes from the checkpoint."""

import io
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.core.rerun_state_machine import Call, Caller
from megatron.remoe.patches.checkpoints import refuse_unsafe_objects
from megatron.remoe.start.checkpoint_files import TRACKER, choose_checkpoint
from megatron.remoe.start.checkpoint_index import INDEX, BrokenCheckpointError, check_object
from tests.checkpoints import Saved, tensors, training, truncate
from tests.entry import shared_entry
from tests.tiny_model import RELU
from tests.training_runs import TINY, logged, records, run, without
from tools.text.corpora.dataset import byte_level_vocabulary


def arguments(folder: Path, step: int | None = None, rank: int = 0) -> Namespace:
    return Namespace(load=str(folder), pretrained_checkpoint=None, ckpt_step=step, rank=rank)


def chosen(folder: Path, step: int | None = None, rank: int = 0) -> int | None:
    """Return --ckpt-step after the choice, or None if Megatron's own choice is kept."""
    args = arguments(folder, step, rank)
    resume = choose_checkpoint(args)
    if resume is not None:
        resume.apply(args)
    return args.ckpt_step


DAMAGES = {
    "truncated tensors": lambda folder: truncate(tensors(folder)),
    "missing tensors": lambda folder: tensors(folder).unlink(),
    "missing index": lambda folder: (folder / INDEX).unlink(),
    "truncated index": lambda folder: truncate(folder / INDEX),
    "missing last file": lambda folder: (folder / "metadata.json").unlink(),
    "empty last file": lambda folder: os.truncate(folder / "metadata.json", 0),
    "missing folder": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_goes_back_to_the_last_whole_checkpoint(damage: str, saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    spoil = DAMAGES[damage]
    assert chosen(saved.root) is None, "whole: Megatron's own choice stands"
    spoil(saved[6])
    assert chosen(saved.root) == 4
    assert str(saved[6]) in (printed := capsys.readouterr().err) and "iteration 4" in printed
    for step in (6, 1):  # 1 was never saved
        with pytest.raises(BrokenCheckpointError, match=f"--ckpt-step {step}: .* 4 is complete") as refused:
            chosen(saved.root, step=step)
        assert refused.value.code == "REMOE-E402"
    spoil(saved[4])
    assert chosen(saved.root) == 2
    spoil(saved[2])
    with pytest.raises(BrokenCheckpointError, match=str(saved.root)) as refused:
        chosen(saved.root)
    assert refused.value.code == "REMOE-E401"


@pytest.mark.parametrize("step", [None, 6])
@pytest.mark.parametrize("content", ["", "12a", "loop", None])
def test_tracker_that_is_damaged_or_missing_is_mended(content: str | None, step: int | None, saved: Saved) -> None:
    tracker = saved.root / TRACKER
    tracker.unlink()
    if content == "loop":
        tracker.symlink_to(tracker.name)
    elif content is not None:
        tracker.write_text(content)
    assert chosen(saved.root, step, rank=1) == 6
    assert tracker.read_text() == "6", "on any rank: Megatron reads it there"
    assert chosen(saved.root) is None, "now Megatron's own choice stands"


def test_a_first_save_that_was_cut_off_is_no_lost_tracker(saved: Saved) -> None:
    (saved.root / TRACKER).unlink()
    for iteration in (2, 4):
        shutil.rmtree(saved[iteration])
    truncate(tensors(saved[6]))
    assert chosen(saved.root) is None and not (saved.root / TRACKER).exists()
    assert chosen(saved.root / "nowhere") is None


def test_pretrained_checkpoint_is_looked_at_too(saved: Saved, tmp_path: Path) -> None:
    """It is checked as long as --load has no checkpoint. A damaged release, which has no iteration, is refused."""
    release = tmp_path / "release"
    shutil.copytree(saved[6], release / "release")
    (release / TRACKER).write_text("release")
    args = arguments(tmp_path / "new")
    args.pretrained_checkpoint = str(release)
    resume = choose_checkpoint(args)
    assert resume is not None and resume.folder == release / "release" and resume.step is None
    truncate(tensors(release / "release"))
    with pytest.raises(BrokenCheckpointError, match="--pretrained-checkpoint"):
        choose_checkpoint(args)
    args.load = str(saved.root)
    resume = choose_checkpoint(args)
    assert resume is not None and resume.folder == saved[6] and resume.step is None


def test_experts_and_gpt2_files_come_from_the_checkpoint(data: Path, tmp_path: Path) -> None:
    """Each run has an empty cache, as on a new machine. It makes the tokenizer's folder again from the two files."""
    vocabulary, merges = byte_level_vocabulary(tmp_path)
    words = training(data, tmp_path / "run", "--save-interval", "1", "--lr-decay-iters", "6")
    words = without(words, "--tokenizer-type", "--num-experts")
    given = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(vocabulary), "--merge-file", str(merges)]
    given += ["--num-experts", "8"]
    for iterations, more in ((1, given), (2, ["--use-checkpoint-args"]), (3, ["--use-checkpoint-args"])):
        cache = str(tmp_path / f"cache{iterations}")
        code, output = shared_entry().run([*words, *more, "--train-iters", str(iterations)], {"XDG_CACHE_HOME": cache})
        assert code == 0 and list(records(output)) == [iterations], output[-3000:]
        shutil.rmtree(cache)


@pytest.mark.parametrize("loader", ["single", "cyclic"])
def test_dropout_and_the_schedule_go_on(loader: str, data: Path, tmp_path: Path) -> None:
    """With dropout, a stop and an evaluation at each step do not change losses. --no-load-optim accepts other rates."""
    words = [*TINY, *RELU, *f"--data-path 1 {data} 2 {data} --eval-iters 1 --dataloader-type {loader}".split()]
    words += "--attention-dropout 0.1 --hidden-dropout 0.1 --eval-interval 2 --start-eval-at-iter 4".split()
    printed, root = run(words), str(tmp_path / "run")
    whole, losses = records(printed), r"(iteration [68] on .*lm loss value: \S+)"
    words += ["--save", root, "--load", root, "--save-interval", "4"]
    run([*words, "--exit-interval", "4", "--eval-interval", "1"])
    shutil.copytree(root, tmp_path / "copy")
    rest = records(resumed := run(words))
    assert re.findall(losses, resumed) == re.findall(losses, printed) != []
    for field in ("lm loss", "learning rate"):
        assert [line[field] for step, line in rest.items() if step > 6] == [whole[step][field] for step in (7, 8)]
    for place in ("--load", "--save"):
        words[words.index(place) + 1] = str(tmp_path / "copy")
    other = records(run([*words, "--no-load-optim", "--lr", "8e-3", "--min-lr", "8e-4"]))
    rates = [float(whole[step]["learning rate"]) for step in (5, 6, 7, 8)]
    assert [float(line["learning rate"]) / 2 for line in other.values()] == pytest.approx(rates, rel=1e-6)


def test_a_checkpoint_after_nan_can_be_read() -> None:
    """After a NaN, Megatron's rerun state has an object that names the failed check."""
    refuse_unsafe_objects()
    content = io.BytesIO()
    torch.save({"failed": Call(Caller("message", 1), 2)}, content)
    content.seek(0)
    check_object("rerun_state_machine_state", content)


def test_a_schedule_of_batches_goes_on_with_more_processes(data: Path, tmp_path: Path) -> None:
    """The last step reads more sequences than --train-samples, and the blend has them."""
    schedule = ["--train-samples", "37", "--step-batch-size-schedule", "0:4 512:8", "--data-path", "1", str(data), "1"]
    schedule += [str(data), "--micro-batch-size", "2", "--log-interval", "3"]
    words = without(training(data, tmp_path / "run", *schedule), "--global-batch-size", "--train-iters")
    first, rest = run([*words, "--exit-interval", "3"]), run(words, processes=2)
    batches = [record["global batch size"] for output in (first, rest) for record in records(output).values()]
    assert " steps of " not in first and "2,368 tokens in all" in first
    assert [*records(rest)] == [4, 6] and batches == ["4", "8", "8", "8"]
    line = logged(tmp_path / "run", "log")[1]
    assert line["tokens_per_second"] * line["seconds_per_iteration"] * 3 == pytest.approx((4 + 4 + 8) * 64, rel=1e-3)


def test_a_different_batch_reads_the_rest(data: Path, tmp_path: Path) -> None:
    """The rest is what was not read, whatever the number of steps. An evaluation needs no rest and no settings."""
    words = training(data, tmp_path / "run", "--train-samples", "40", "--data-path", "1", str(data), "1", str(data))
    words = without(words, "--train-iters")
    run([*words, "--global-batch-size", "4", "--exit-interval", "5"])
    rest = run([*words, "--global-batch-size", "8", "--allow-changed-settings"])
    assert [*records(rest)] == [6, 7]
    output = run(without([*words, "--skip-train", "--eval-iters", "1", "--seed", "2"], "--lr"))
    assert "validation loss at iteration 7" in output and "Training: " not in output
