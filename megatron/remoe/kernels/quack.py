"""QuACK's grouped products, `--moe-kernels quack`: they gather tokens as they load, and apply SwiGLU as they store.

P pairs in the order of the experts, H hidden size, F the experts' FFN size. Columns of the first product and of its
gradient, `[P, 2 * F]`, alternate between left and right; weights have one half after the other ("concat"). `Products`
says what each function takes and returns.

Tiles are QuACK's defaults, except where these spill: tuning would start again with each number of pairs.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from quack.activation import swiglu
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.epilogue.ops import ColVecLoad
from quack.gemm_interface import default_config, gemm, gemm_add_inplace, gemm_dgated

from megatron.remoe.kernels.backend import Products


@cache
def _narrow_tiles(device: torch.device) -> Any:
    """Return the tiles of `down_backward`: with Hopper's default, 192 columns, a thread spills 240 bytes."""
    config = default_config(device)
    return replace(config, tile_n=128) if config.device_capacity == 9 else config


@gemm_epilogue(outputs=("activated",), ops={"gates": ColVecLoad("gates")}, mode="acc_pair")
def _gated_swiglu(acc, gates):
    left, right = unpack(acc)
    return {"D": pack(left, right), "activated": swiglu(left, right) * gates}


def up(
    tokens: torch.Tensor, index: torch.Tensor | None, gates_P: torch.Tensor, fc1: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    found = _gated_swiglu(
        tokens, fc1.transpose(1, 2), tuned=False, cu_seqlens_m=starts, A_idx=index, concat_layout=("B",), gates=gates_P
    )
    return found["D"], found["activated"]


def down(activated_PF: torch.Tensor, fc2: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return gemm(activated_PF, fc2.transpose(1, 2), cu_seqlens_m=starts, tuned=False)


def down_backward(
    gradient: torch.Tensor, index: torch.Tensor | None, gates_P: torch.Tensor, fc2: torch.Tensor, hidden: torch.Tensor,
    starts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return gemm_dgated(
        gradient, fc2, hidden, activation="swiglu", colvec_scale=gates_P, colvec_reduce=True, cu_seqlens_m=starts,
        A_idx=index, dynamic_scheduler=False, config=_narrow_tiles(gradient.device),
    )  # fmt: skip


def up_backward(d_hidden: torch.Tensor, fc1: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return gemm(d_hidden, fc1, cu_seqlens_m=starts, concat_layout=("B",), tuned=False)


def outers(
    tokens: torch.Tensor, index: torch.Tensor | None, rows: torch.Tensor, out: torch.Tensor, starts: torch.Tensor,
    alternate: bool, adds: bool,
) -> None:  # fmt: skip
    layout = ("out",) if alternate else None
    options = {"cu_seqlens_k": starts, "A_idx": index, "concat_layout": layout, "tuned": False}
    if adds:
        gemm_add_inplace(tokens.T, rows, out, **options)
    else:
        gemm(tokens.T, rows, out=out, **options)


PRODUCTS = Products(up, down, down_backward, up_backward, outers)
