"""Run Megatron in one process without a launcher. Call `on_cpu.megatron_on_cpu` before importing this on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@contextmanager
def one_process(seed: int = 1234, backend: str = "gloo") -> Iterator[None]:
    """Set up Megatron's process groups for one process, and its random generators, unless there are groups already."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
