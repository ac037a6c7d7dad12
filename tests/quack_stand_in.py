"""A stand-in for the functions of QuACK that this project imports, by their documentation, on any device and dtype.

Rows outside of the given bounds are NaN, because the kernels do not write them.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from megatron.remoe.kernels.backend import Products

ADAPTER = "megatron.remoe.kernels.quack"
Indices, Layout = torch.Tensor | None, tuple[str, ...] | None


def _non_contiguous(matrices: torch.Tensor) -> int:
    return -2 if matrices.stride(-1) == 1 else -1


def alternate(matrices: torch.Tensor) -> torch.Tensor:
    """Interleave the first and second half of the rows, or of the columns if these are contiguous."""
    dim = _non_contiguous(matrices)
    return torch.stack(matrices.chunk(2, dim), dim=dim).flatten(dim - 1, dim)


@dataclass(frozen=True)
class Config:
    """Hopper's default tiles."""

    tile_n: int = 192
    device_capacity: int = 9


def gemm(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, *, tuned: bool, cu_seqlens_m: Indices = None,
    cu_seqlens_k: Indices = None, A_idx: Indices = None, concat_layout: Layout = None, adds: bool = False,
) -> torch.Tensor:  # fmt: skip
    assert not tuned, "tuning would start again with each number of rows"
    starts = cu_seqlens_k if cu_seqlens_m is None else cu_seqlens_m
    assert starts is not None and starts.dtype == torch.int32
    bounds = [slice(*pair) for pair in starts.unfold(0, 2, 1).tolist()]
    B = alternate(B) if "B" in (concat_layout or ()) else B
    if cu_seqlens_m is not None:
        rows = A if A_idx is None else A[A_idx]
        result = rows.new_full((len(rows), B.shape[-1]), torch.nan)
        for part, weight in zip(bounds, B, strict=True):
            result[part] = rows[part] @ weight
        return result
    assert out is not None and A.stride(0) == 1 and B.stride(1) == 1  # the kernel requires these strides
    columns = A if A_idx is None else A[:, A_idx]
    result = torch.stack([columns[:, part] @ B[part] for part in bounds])
    if "out" in (concat_layout or ()):
        dim = _non_contiguous(out)
        places = torch.arange(result.shape[dim]).view(-1, 2).T.flatten()
        result = result.index_select(dim, places)
    return out.add_(result) if adds else out.copy_(result)


def gemm_add_inplace(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
    gemm(A, B, out, **options, adds=True)


def gemm_dgated(
    A: torch.Tensor, B: torch.Tensor, PreAct: torch.Tensor, *, activation: str, colvec_scale: torch.Tensor,
    colvec_reduce: bool, dynamic_scheduler: bool, config: "Config", **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    assert activation == "swiglu" and colvec_reduce and not dynamic_scheduler and colvec_scale.dtype == torch.float32
    assert config == Config(tile_n=128)
    gradient, scale = gemm(A, B, tuned=False, **options), colvec_scale.unsqueeze(1)
    left, right = unpack(PreAct)
    slope = torch.sigmoid(left) * (1 + left * (1 - torch.sigmoid(left)))
    activated, scaled = silu(left) * right, gradient * scale
    return pack(scaled * slope * right, scaled * silu(left)), activated * scale, (activated * gradient).sum(dim=1)


def pack(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([left, right], dim=-1).flatten(-2)


def unpack(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs[..., ::2], pairs[..., 1::2]


def gemm_epilogue(outputs: tuple[str, ...], ops: dict[str, Any], mode: str) -> Callable[..., Any]:
    assert mode == "acc_pair"

    def decorate(epilogue: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
        def fused(A: torch.Tensor, B: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
            vectors = {name: options.pop(name).unsqueeze(1) for name in ops}
            assert all(vector.dtype == torch.float32 for vector in vectors.values())  # the kernel loads 32 bits
            found = epilogue(gemm(A, B, **options), **vectors)
            assert found.keys() == {"D", *outputs}
            return found

        return fused

    return decorate


def put_in(monkeypatch: pytest.MonkeyPatch) -> Products:
    """Replace QuACK by the stand-in, and return the adapter's products."""
    # fmt: off
    contents: dict[str, dict[str, Any]] = {
        "quack": {},
        "quack.activation": {"swiglu": lambda left, right: silu(left) * right},
        "quack.epilogue": {"gemm_epilogue": gemm_epilogue, "pack": pack, "unpack": unpack},
        "quack.epilogue.ops": {"ColVecLoad": lambda name: name},
        "quack.gemm_interface": {
            "default_config": lambda _device: Config(), "gemm": gemm, "gemm_add_inplace": gemm_add_inplace,
            "gemm_dgated": gemm_dgated,
        },
    }
    # fmt: on
    for name, functions in contents.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, ADAPTER, None)  # so that it is removed again after the test
    del sys.modules[ADAPTER]
    return importlib.import_module(ADAPTER).PRODUCTS
