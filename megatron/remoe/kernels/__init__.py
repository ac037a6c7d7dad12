"""A MoE layer's operations between its matrix products, in PyTorch (the reference) and as Triton kernels.

`backend.py` chooses one of them for each router and layer. Modules with kernels are imported only if Triton is chosen,
because not every machine has Triton.
"""
