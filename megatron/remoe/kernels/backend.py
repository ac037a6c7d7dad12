"""Choose the backend of a router or a MoE layer, once when it is built."""

from megatron.remoe.kernels.interface import Backend
from megatron.remoe.kernels.pytorch import PYTORCH


def wants_kernels(config: object) -> bool:
    """Return whether a configuration, or Megatron's arguments, select Triton with `--moe-kernels`."""
    return getattr(config, "moe_kernels", "torch") != "torch"


def choose_backend(config: object) -> Backend:
    """Return the backend of `moe_kernels`; PyTorch's for a configuration without this field, such as Megatron's own."""
    if not wants_kernels(config):
        return PYTORCH
    from megatron.remoe.kernels.triton import TRITON  # not every machine has Triton

    return TRITON
