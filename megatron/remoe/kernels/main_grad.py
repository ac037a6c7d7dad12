"""Add weight gradients to Megatron's buffer, `weight.main_grad`, instead of returning them to autograd."""

import torch


def find_main_grad(weight: torch.Tensor) -> torch.Tensor | None:
    """Return Megatron's gradient buffer of `weight`; None if `add_outer` cannot add to it."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not hasattr(weight, "grad_added_to_main_grad"):
        return None
    # Only cuBLAS accumulates half-precision products in fp32.
    is_wider = weight.is_cuda and weight.itemsize == 2 and main_grad.dtype == torch.float32
    return main_grad if main_grad.dtype == weight.dtype or is_wider else None


def mark_as_added(weight: torch.Tensor) -> torch.Tensor:
    """Tell Megatron that `main_grad` has the gradient of `weight`. Call it in the backward pass.

    Returns:
        A gradient for autograd, which Megatron never reads. It is sparse and empty, so that a layer's chunks do not add
        up full-size gradients. Megatron's hook, which can start the reduction of `main_grad`, runs on the stream that
        the model was wrapped on. Autograd makes that stream wait for this one only if the gradient is not None.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    size, dtype, device = weight.shape, weight.dtype, weight.device
    return torch.sparse_coo_tensor(size=size, dtype=dtype, device=device, check_invariants=False)  # type: ignore[call-arg]


def add_outer(rows: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor) -> None:
    """Add `gradient.T @ rows` to `out`, in the dtype of `out`: `[rows, in]`, `[rows, out]` → `[out, in]`."""
    if out.dtype == rows.dtype:
        out.addmm_(gradient.T, rows)
    else:
        torch.addmm(out, gradient.T, rows, out_dtype=out.dtype, out=out)
