"""Test DeepEP with a slot for each expert that a token can have: Megatron's code, and a stand-in for the kernels."""

from pathlib import Path

import pytest

from tests.entry import entry_with
from tests.tiny_model import RELU
from tests.trainings import TINY, series

NAMES = ("lm loss", "sparsity", "l1 loss", "l1 coefficient", "grad norm")
DEEPEP = "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep --moe-router-dtype fp32".split()


def test_training_is_that_of_alltoall(data: Path) -> None:
    """Two ranks, which start in chunks, train as with alltoall, with a slot for each expert and with three slots."""
    with entry_with(Path(__file__).parent / "deepep") as entry:
        for cap in ([], ["--moe-relu-max-experts", "3"]):
            more = ["--data-path", str(data), *RELU, *cap, "--expert-model-parallel-size", "2", "--train-iters", "3"]
            found = []
            for dispatcher in (DEEPEP, []):
                code, output = entry.run([*TINY, *more, *dispatcher], processes=2, limit=120)
                assert code == 0, output[-2000:]
                found.append([series(output, name) for name in NAMES])
            for mine, right in zip(*found, strict=True):
                assert mine == pytest.approx(right, rel=1e-4)
