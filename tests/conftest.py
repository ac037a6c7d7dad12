"""Tests run in one process on the CPU, or on the GPU where there is one; layouts are tested by real trainings."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tools")]

from megatron.remoe import console, cpu  # noqa: E402

console.hide_unhelpful_warnings()
if cpu.is_wanted([]):
    cpu.install()


@pytest.fixture(scope="session")
def process_groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's process groups for a world of one process."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1234)
    # As Megatron's start-up does; the first value decides the shape of all that follow.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu"))
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a small Megatron data set of real text: the standard library's asyncio package, byte by byte."""
    import asyncio

    from golden_run import write_documents

    prefix = tmp_path_factory.mktemp("data") / "stdlib"
    write_documents(prefix, [path.read_bytes() for path in sorted(Path(asyncio.__file__).parent.glob("*.py"))])
    return prefix
