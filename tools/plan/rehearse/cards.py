"""The GPUs that a rehearsal can simulate, and the rates of its timing model."""

from ..cost.gpus import ACCELERATORS

CARDS = {kind: card for kind, card in ACCELERATORS.items() if card.title}
# Shares of the data sheet's figures, until --rate gives measured rates. Bandwidth: copies on H100 and H200 with PyTorch
# 2.11 reach 3.0 and 4.3 TB/s. Grouped: Transformer Engine's product of 8 experts, 509 to 650 TFLOP/s on H100
# (NVIDIA/TransformerEngine#2045). Products and attention at head size 128 are assumed between published ones.
SHARES = {"products": 0.57, "grouped": 0.57, "attention": 0.46, "bandwidth": 0.9, "link": 0.8}
# PyTorch's grouped_mm with experts of FFN size F: F / (F + 800) of the rate. With it a layer's forward pass takes 10.5
# and 11.1 ms where ByteDance-Seed/VeOmni#460 has 10.2 (128 experts of 768, 242 TFLOP/s) and 11.4 (512 of 512, 181).
HALF_RATE_EXPERT = 800
# QuACK's likewise: with it and the sums a layer's forward pass has 331 and 412 TFLOP/s where SonicMoE, which is made of
# its products, has 340 and 400 (arXiv 2512.14080, figure 14: H100, hidden size 768, 128 experts of 256, 64 of 512).
HALF_RATE_FUSED = 110
# Attention is bound by its exponentials below this head size: cuDNN's causal one at 64 and sequence 1024 reaches 288
# TFLOP/s forward (FlashAttention-3, arXiv 2407.08608, figure 5), and backward about 220.
FULL_RATE_HEAD = 128
NETWORK = 50.0  # GB/s and direction of each GPU to other nodes: 400 Gbit/s
SMALLEST = 2.3  # microseconds that any kernel takes
# Microseconds of a collective for each doubling of its ranks, as in a tree, within a node and over nodes: assumed too.
LATENCY, NETWORK_LATENCY = 5.0, 10.0
CONTEXT = 0.6  # GiB that the driver's context takes of the card
# Microseconds of the host for each call of a Python function, and for each launch with what PyTorch does around it:
# fitted to the CPU time of two 182M steps over the no-op CUDA, 103 ms with 73,400 calls and 4,783 launches,
# 123 ms with 43,600 and 9,603 (AMD EPYC Zen 5, Python 3.13). The hosts of H100s take HOST times as long: 114 ns for a
# call that takes 77 to 98 there (pytorch/pytorch#187862), and 8.7 µs for a Triton launch, driver included, that takes
# 5.2 (vllm-project/vllm#34838). DRIVER, the launch itself, is assumed.
FRAME, LAUNCH, HOST, DRIVER = 0.8, 9.0, 1.3, 2.0


def rates(name: str) -> dict[str, float]:
    """Return products, grouped, attention in TFLOP/s, bandwidth in TB/s, link, network in GB/s, the others in µs."""
    card = CARDS[name]
    found = {kind: SHARES[kind] * card.tflops for kind in ("products", "grouped", "attention")}
    found |= {"bandwidth": SHARES["bandwidth"] * card.bandwidth, "link": SHARES["link"] * card.link}
    found |= {"network": NETWORK, "smallest": SMALLEST, "latency": LATENCY, "network_latency": NETWORK_LATENCY}
    found |= {"frame": HOST * FRAME, "launch": HOST * LAUNCH + DRIVER}
    return {kind: round(rate, 3) for kind, rate in found.items()}
