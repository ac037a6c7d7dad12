"""Test that changed bytes of a checkpoint are found on loading, and that whole checkpoints are not overwritten."""

import shutil
from pathlib import Path

from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from megatron.remoe.start.checkpoint_files import TRACKER
from tests.checkpoints import Saved, flip, tensors, training, truncate
from tests.training_runs import records, run, without

VERIFIED = "--verify-integrity"


def test_changed_bytes_lead_back_and_to_the_same_end(data: Path, tmp_path: Path) -> None:
    """Iteration 6 has a changed bit, and 4 is truncated. A damaged iteration that --ckpt-step asks for is refused.

    A checkpoint without hashes is loaded unverified.
    """
    saved = Saved(tmp_path / "run")
    words = training(data, saved.root, VERIFIED)
    run(words, processes=2)
    whole = saved.copy(tmp_path / "whole")
    flip(tensors(saved[4]))
    output = run([*words, "--ckpt-step", "4"], expect=1)
    assert "REMOE-E402" in output and "Iteration 2 " in output and "Traceback" not in output
    truncate(tensors(saved[4]))
    flip(tensors(saved[6]))
    output = run(words, processes=2)
    assert output.count("Going back to iteration 2") == 1 and list(records(output)) == [3, 4, 5, 6]
    whole.assert_same_weights(saved, 6)
    (saved[6] / INTEGRITY_FNAME).unlink()
    assert list(records(run([*words, "--train-iters", "7", "--lr-decay-iters", "6"], processes=2))) == [7]


def test_one_file_per_rank(data: Path, tmp_path: Path) -> None:
    words = training(data, tmp_path, "--ckpt-format", "torch")
    run(words)
    file = next(tmp_path.glob("iter_0000006/mp_rank_00/*.pt"))
    truncate(file)
    output = run(words)
    assert str(file) in output and "Going back to iteration 4" in output and list(records(output)) == [5, 6]


def test_whole_checkpoints_are_not_overwritten_by_another_start(saved: Saved, data: Path, tmp_path: Path) -> None:
    words, base = without(training(data, saved.root), "--load"), saved.copy(tmp_path / "base")
    for iteration in (4, 6):
        shutil.rmtree(base[iteration])
    (base.root / TRACKER).write_text("2")
    before = {path: path.read_bytes() for path in saved.root.rglob("*") if path.is_file()}
    for start in (["--load", str(base.root)], ["--finetune", "--load", str(saved.root)]):
        assert "REMOE-E407" in run([*words, *start], expect=2)
    assert {path: path.read_bytes() for path in before} == before
    back = run(training(data, saved.root, "--ckpt-step", "4"))
    assert f"--save {saved.root}: holds iteration 6" in back and list(records(back)) == [5, 6]


def test_one_command_starts_from_a_model_and_resumes(saved: Saved, data: Path, tmp_path: Path) -> None:
    words = training(data, tmp_path / "new", "--pretrained-checkpoint", str(saved.root))
    assert list(records(run([*words, "--exit-interval", "4"]))) == [1, 2, 3, 4]
    assert list(records(run(words))) == [5, 6]
