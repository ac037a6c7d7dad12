"""Kinds of accelerators, by the figures of their data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator. A rehearsal needs all of it; the cost of a training needs rate and memory.

    Attributes:
        tflops: dense bf16 matrix products in TFLOP/s, without sparsity.
        memory: in GiB: an accelerator sold with 80 GB has about 80 GiB.
        title: as CUDA names it.
        capability: compute capability.
        multiprocessors: their number.
        bandwidth: of its memory, in TB/s.
        link: to the other GPUs of a node, in GB/s and direction.
    """

    tflops: float
    memory: float
    title: str = ""
    capability: str = ""
    multiprocessors: int = 0
    bandwidth: float = 0.0
    link: float = 0.0


ACCELERATORS: dict[str, Accelerator] = {
    "a100-40": Accelerator(312, 40),
    "a100": Accelerator(312, 80, "NVIDIA A100-SXM4-80GB", "8.0", 108, 2.04, 300),
    "a40": Accelerator(149.7, 48),
    "l40s": Accelerator(362, 48),
    "rtx4090": Accelerator(165.2, 24),
    "h100-pcie": Accelerator(756, 80),
    "h100": Accelerator(989, 80, "NVIDIA H100 80GB HBM3", "9.0", 132, 3.35, 450),
    "h200": Accelerator(989, 141, "NVIDIA H200", "9.0", 132, 4.8, 450),
    "b200": Accelerator(2250, 180, "NVIDIA B200", "10.0", 148, 8.0, 900),
}
