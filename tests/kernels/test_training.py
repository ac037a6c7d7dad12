"""Test that a training run with the Triton kernels of router, dispatch and experts equals one without them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.gpu.runs import FP32_GPU
from tests.tiny_model import RELU
from tests.training_runs import TINY, run, series

# In the interpreter each program of a kernel takes milliseconds.
SHORT = "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4".split()
SHORT += ["--train-iters", "2"]


def test_trainings_are_equal(data: Path) -> None:
    """Both runs use expert parallelism, except on a machine with one GPU."""
    processes = 1 if torch.cuda.device_count() == 1 else 2
    flags = [*TINY, *RELU, *SHORT, "--data-path", str(data), "--expert-model-parallel-size", str(processes)]
    flags += FP32_GPU if torch.cuda.is_available() else []
    plain = run(flags, processes)
    actual = run([*flags, "--moe-kernels", "triton"], processes)
    for name in ("lm loss", "sparsity", "l1 loss", "grad norm"):
        assert series(actual, name) == pytest.approx(series(plain, name), rel=1e-5), name
