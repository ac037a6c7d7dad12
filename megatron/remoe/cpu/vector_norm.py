"""Compute the 2-norm of large single-precision tensors: on a CPU, PyTorch adds too many squares in fp32.

In torch 2.15.0 the norm of 50 million normal numbers is 0.4 % too small.
"""

import torch

# Number of elements whose squares are summed in single precision.
CHUNK = 1 << 18


def sum_in_chunks() -> torch.library.Library:
    """Let `torch.norm` of large contiguous fp32 tensors on the CPU add dot products of parts in double precision.

    Megatron clips the gradients of many experts in one tensor by this norm. Other norms, and tensors of up to `CHUNK`
    elements, stay PyTorch's, bit for bit.

    Returns:
        An object that keeps the change while it is referenced.
    """
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    stock = torch.library.get_kernel("aten::linalg_vector_norm", "CPU")

    def vector_norm(
        self: torch.Tensor,
        ord: float = 2,
        dim: list[int] | None = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        is_plain = ord == 2 and not dim and not keepdim and dtype in (None, torch.float32)
        if is_plain and self.dtype == torch.float32 and self.numel() > CHUNK and self.is_contiguous():
            squares = torch.stack([torch.dot(part, part) for part in self.view(-1).split(CHUNK)])
            return squares.sum(dtype=torch.float64).sqrt().float()
        return stock.call_boxed(cpu, self, ord, dim, keepdim, dtype=dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("linalg_vector_norm", vector_norm, "CPU")
    return library
