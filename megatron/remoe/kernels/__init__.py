"""A MoE layer's operations between its matrix products, in PyTorch (the reference) and as Triton kernels.

`pytorch.py` defines them. `triton.py` collects the kernels of `gates.py`, `plan.py` and `swiglu.py`. `backend.py`
chooses one of the two for each router and layer, and imports Triton only then, because not every machine has it.
"""
