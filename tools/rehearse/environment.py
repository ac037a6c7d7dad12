"""The environment in which a process runs over the CUDA that does nothing."""

from ..cost.gpus import ACCELERATORS
from . import build
from .cards import CARDS, CONTEXT


def environment_of(gpu: str, devices: int) -> dict[str, str]:
    """What is set on top of this process's.

    Args:
        gpu: the kind of card, a key of `CARDS`.
        devices: how many of them the process sees.

    Raises:
        ToolError: the CUDA that does nothing cannot be built here.
    """
    card, libraries = CARDS[gpu], build.libraries()
    return {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "REHEARSAL_CARD": card.title,
        "REHEARSAL_CAPABILITY": card.capability,
        "REHEARSAL_MULTIPROCESSORS": str(card.multiprocessors),
        "REHEARSAL_DEVICES": str(devices),
        "REHEARSAL_GIB": str(ACCELERATORS[gpu].memory - CONTEXT),
        "TRITON_LIBCUDA_PATH": str(libraries[0].parent),
        "TRITON_CACHE_DIR": str(build.cache() / "triton"),
        "TRITON_INTERPRET": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
