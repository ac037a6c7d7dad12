"""ReLU routing for Mixture-of-Experts models on Megatron (ReMoE, arXiv 2412.14711)."""

__version__ = "0.1.0"
