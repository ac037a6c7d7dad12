"""A MoE layer's operations between its matrix products, in PyTorch (the reference) and as Triton kernels.

`backend.py` chooses, once for each router and layer. Modules with kernels are imported only if Triton is chosen: not
every machine has it.
"""


def wants_kernels(config: object) -> bool:
    """Return whether a configuration or Megatron's arguments ask for Triton by `--moe-kernels`."""
    return getattr(config, "moe_kernels", "torch") != "torch"
