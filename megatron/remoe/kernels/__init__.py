"""A MoE layer's operations between its matrix products, in PyTorch (the reference) and as Triton kernels.

`backend.py` chooses, once for each router and layer. Modules with kernels are imported only if Triton is chosen: not
every machine has it.
"""


def wants_kernels(config: object) -> bool:
    """Return whether a configuration or Megatron's arguments ask for Triton by `--moe-kernels`."""
    return getattr(config, "moe_kernels", "torch") != "torch"


def cdiv(number: int, divisor: int) -> int:
    """Return the quotient, rounded up; Triton's own takes ten Python calls at each launch."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least a number; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
