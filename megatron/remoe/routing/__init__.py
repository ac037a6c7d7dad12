"""The method: gates, L1, counts, and the coefficient that holds the sparsity (arXiv 2412.14711)."""
