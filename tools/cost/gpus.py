"""Kinds of accelerators, by the figures of their data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator.

    Attributes:
        tflops: dense bf16 matrix products in TFLOP/s, without sparsity.
        memory: in GiB: an accelerator sold with 80 GB has about 80 GiB.
    """

    tflops: float
    memory: float

    def hours(self, flops: float, gpus: int, utilization: float) -> float:
        """Return the hours for `flops` on so many GPUs at the share `utilization` of their rate."""
        return flops / (gpus * self.tflops * 1e12 * utilization) / 3600


ACCELERATORS: dict[str, Accelerator] = {
    "a100-40": Accelerator(312, 40),
    "a100": Accelerator(312, 80),
    "a40": Accelerator(149.7, 48),
    "l40s": Accelerator(362, 48),
    "rtx4090": Accelerator(165.2, 24),
    "h100-pcie": Accelerator(756, 80),
    "h100": Accelerator(989, 80),
    "h200": Accelerator(989, 141),
    "b200": Accelerator(2250, 180),
}
