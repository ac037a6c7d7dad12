"""`--transformer-impl local` on PyTorch's own fused and grouped kernels, for any routing."""
