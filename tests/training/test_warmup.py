"""Test the near-dense warm-up of a top-k MoE: a larger k in the first steps."""

from pathlib import Path

import pytest

from tests.tiny_model import TOPK
from tests.training_runs import TINY, run, step_losses


@pytest.mark.timeout(300)
def test_it_uses_the_steps_k_and_resumes_on_ranks_that_exchange_tokens(data: Path, tmp_path: Path) -> None:
    def train(*more: str, processes: int = 1) -> list[float]:
        shared = [*TINY, *TOPK, "--data-path", str(data), "--train-iters", "4", "--save-interval", "1"]
        return step_losses(run([*shared, *more], processes))

    warmup = "--moe-warmup-topk 6 --moe-warmup-steps 2".split()
    whole = train(*warmup, "--save", str(tmp_path))
    assert whole[:2] == train("--moe-router-topk", "6", "--exit-interval", "2")
    ranks = ["--expert-model-parallel-size", "2"]
    resumed = train(*warmup, *ranks, "--load", str(tmp_path), "--ckpt-step", "1", processes=2)
    assert whole[1:] == pytest.approx(resumed, rel=1e-4)
    sparse = train("--load", str(tmp_path), "--ckpt-step", "2", "--allow-changed-settings")
    assert whole[2:] == pytest.approx(sparse, rel=1e-5)
