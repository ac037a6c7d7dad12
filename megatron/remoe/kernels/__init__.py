"""What a MoE layer does between its products, as Triton kernels: `--moe-kernels triton`.

Each stands for a function of plain PyTorch in another room, and gives the same numbers. Modules here are imported where
the kernels are chosen and not before: Triton is not on every machine.
"""


def wants_kernels(config: object) -> bool:
    """Whether a configuration of a transformer, `--moe-kernels`, asks for them; Megatron's own cannot."""
    return getattr(config, "moe_kernels", "torch") == "triton"
