"""The method (arXiv 2412.14711): router.py has the gates and L1; controller.py and counts.py hold the sparsity."""
