"""The GPUs that a rehearsal can play, and the rates of its model of time."""

from dataclasses import dataclass

from ..cost.gpus import ACCELERATORS


@dataclass(frozen=True)
class Card:
    """One kind of GPU.

    Attributes:
        title: as CUDA names it.
        capability: compute capability.
        multiprocessors: their number.
        bandwidth: of its memory, in TB/s, by its data sheet.
        link: to the other GPUs of a node, in GB/s and direction, by its data sheet.
    """

    title: str
    capability: str
    multiprocessors: int
    bandwidth: float
    link: float


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", "8.0", 108, 2.04, 300),
    "h100": Card("NVIDIA H100 80GB HBM3", "9.0", 132, 3.35, 450),
    "h200": Card("NVIDIA H200", "9.0", 132, 4.8, 450),
    "b200": Card("NVIDIA B200", "10.0", 148, 8.0, 900),
}
# Assumed shares of the data sheet's figures, until --rate gives measured rates.
SHARES = {"products": 0.57, "grouped": 0.49, "attention": 0.46, "bandwidth": 0.75, "link": 0.8}
NETWORK = 50.0  # GB/s and direction of each GPU to other nodes: 400 Gbit/s
SMALLEST = 2.3  # microseconds that any kernel takes
# Microseconds of a collective for each doubling of its ranks, as in a tree, within a node and over nodes: assumed too.
LATENCY, NETWORK_LATENCY = 5.0, 10.0
CONTEXT = 0.6  # GiB that the driver's context takes of the card


def rates(name: str) -> dict[str, float]:
    """Return products, grouped, attention in TFLOP/s, bandwidth in TB/s, link, network in GB/s, the others in µs."""
    card, peak = CARDS[name], ACCELERATORS[name].tflops
    found = {kind: SHARES[kind] * peak for kind in ("products", "grouped", "attention")}
    found |= {"bandwidth": SHARES["bandwidth"] * card.bandwidth, "link": SHARES["link"] * card.link}
    found |= {"network": NETWORK, "smallest": SMALLEST, "latency": LATENCY, "network_latency": NETWORK_LATENCY}
    return {kind: round(rate, 3) for kind, rate in found.items()}
