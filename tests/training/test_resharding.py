"""Test that a checkpoint resumes in another layout with the steps of an unbroken run, also in a top-k MoE's warm-up."""

from pathlib import Path

import pytest

from tests.tiny_model import TOPK
from tests.training.conftest import L1
from tests.training_runs import TINY, run, series, step_losses

RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
# Buckets that end in padding: the parameters after one of them have a different place without it.
PADDED = "--overlap-grad-reduce --ddp-bucket-size 30000 --ddp-pad-buckets-for-high-nccl-busbw".split()
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "one process, distributed optimizer": (1, ["--use-distributed-optimizer"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP2, distributed optimizer": (
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split(),
    ),
    "DP2, reshardable": (2, [*RESHARDABLE, *PADDED]),
    "TP2, reshardable": (2, [*TP2, *RESHARDABLE]),
    "experts one by one": (1, ["--no-local-layer-fusion"]),
    "expert TP2": (2, [*TP2, "--expert-tensor-parallel-size", "2"]),
}
CHANGES = [
    ("PP2", "one process"),
    ("DP2, distributed optimizer", "one process, distributed optimizer"),
    ("DP2, reshardable", "TP2, reshardable"),
    ("experts one by one", "expert TP2"),
]
SAVED, END = 2, 4


def train(data: Path, layout: str, *more: str) -> str:
    processes, flags = LAYOUTS[layout]
    settings = ["--train-iters", str(END), "--save-interval", str(SAVED)]
    return run([*TINY, *L1, "--data-path", str(data), *settings, *flags, *more], processes)


@pytest.fixture(scope="module")
def whole(data: Path, initial: list[str]) -> str:
    return train(data, "one process", *initial)


@pytest.mark.parametrize(("source", "target"), CHANGES, ids=[" to ".join(change) for change in CHANGES])
def test_next_steps_are_the_same(source: str, target: str, data, initial: list[str], whole: str, tmp_path) -> None:
    train(data, source, *initial, "--save", str(tmp_path), "--exit-interval", str(SAVED))
    output = train(data, target, "--load", str(tmp_path))
    assert step_losses(output) == pytest.approx(step_losses(whole)[SAVED:], rel=1e-4)
    assert series(output, "l1 coefficient") == series(whole, "l1 coefficient")[SAVED:]
    assert series(output, "sparsity") == pytest.approx(series(whole, "sparsity")[SAVED:], abs=1e-3)


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["whole", "distributed"])
def test_a_first_stage_without_experts(optimizer: list[str], data: Path, tmp_path: Path) -> None:
    """Only the first rank saves step counts, and there the optimizer of experts has no parameters."""
    flags = ["--moe-layer-freq", "[0,1]", "--save", str(tmp_path), *optimizer]
    unbroken = train(data, "PP2", *flags)
    resumed = train(data, "PP2", *flags, "--load", str(tmp_path), "--ckpt-step", str(SAVED))
    assert step_losses(resumed) == pytest.approx(step_losses(unbroken)[SAVED:], rel=1e-6)


@pytest.mark.timeout(300)
def test_a_warmup_uses_the_steps_k_and_goes_on_in_another_layout(data: Path, tmp_path: Path) -> None:
    """A top-k MoE has a larger k in its first steps."""

    def run_steps(*more: str, processes: int = 1) -> list[float]:
        shared = [*TINY, *TOPK, "--data-path", str(data), "--train-iters", "4", "--save-interval", "1"]
        return step_losses(run([*shared, *more], processes))

    warmup = "--moe-warmup-topk 6 --moe-warmup-steps 2".split()
    whole = run_steps(*warmup, "--save", str(tmp_path))
    assert whole[:2] == run_steps("--moe-router-topk", "6", "--exit-interval", "2")
    ranks = ["--expert-model-parallel-size", "2"]
    resumed = run_steps(*warmup, *ranks, "--load", str(tmp_path), "--ckpt-step", "1", processes=2)
    assert whole[1:] == pytest.approx(resumed, rel=1e-4)
    sparse = run_steps("--load", str(tmp_path), "--ckpt-step", "2", "--allow-changed-settings")
    assert whole[2:] == pytest.approx(sparse, rel=1e-5)
