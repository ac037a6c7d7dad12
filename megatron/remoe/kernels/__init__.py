"""A MoE layer's operations between its matrix products, in PyTorch (the reference) and as Triton kernels.

`backend.py` chooses one of them for each router and layer. Modules with kernels are imported only if Triton is chosen,
because not every machine has Triton.
"""


def wants_kernels(config: object) -> bool:
    """Return whether a configuration, or Megatron's arguments, select Triton with `--moe-kernels`."""
    return getattr(config, "moe_kernels", "torch") != "torch"
