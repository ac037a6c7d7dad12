"""SwiGLU with gates, between an expert's two products: one pass over memory each way, fp32 inside.

P pairs, F the experts' FFN size. A program handles a tile of pairs and columns; in the backward pass, all columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2

TILE = 1024


def activate(hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Compute `pytorch.activate`; moves `3 · P · F` elements."""
    activated = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)
    (pairs, width), (num_pairs, ffn) = _tile(activated), activated.shape
    grid = cdiv(num_pairs, pairs), cdiv(ffn, width)
    _activate[grid](hidden, gates, activated, num_pairs, ffn, PAIRS=pairs, WIDTH=width)
    return activated


def activate_backward(
    hidden: torch.Tensor, gates: torch.Tensor, d_activated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `pytorch.activate_backward`; moves `6 · P · F` elements.

    `activate`'s result is written into the memory of `d_activated`.
    """
    d_hidden, d_gates = torch.empty_like(hidden), torch.empty_like(gates)
    (pairs, width), (num_pairs, ffn) = _tile(d_activated), d_activated.shape
    _activate_backward[(cdiv(num_pairs, pairs),)](
        hidden, gates, d_activated, d_hidden, d_gates, num_pairs, ffn, PAIRS=pairs, WIDTH=width
    )
    return d_activated, d_hidden, d_gates


def _tile(activated: torch.Tensor) -> tuple[int, int]:
    """Return the number of pairs and of columns that a program handles at once."""
    width = min(next_power_of_2(activated.shape[1]), TILE)
    return TILE // width, width


def _backward_bytes(grid: Any, metadata: Any, args: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that a launch moves: `activated_PF` is read and written."""
    hidden, gates = args["hidden_PF"], args["gates_P"]
    return {"bytes": 3 * hidden.numel() * hidden.element_size() + 2 * gates.numel() * gates.element_size()}


# The number of pairs changes with each launch. If specialized for it, both kernels would be recompiled during training.
@triton.jit(do_not_specialize=["num_pairs"])
def _activate(hidden_PF, gates_P, activated_PF, num_pairs, ffn, PAIRS: tl.constexpr, WIDTH: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(gates_P + pair, mask=pair < num_pairs, other=0.0).to(tl.float32)[:, None]
    inside, left, right = _halves(hidden_PF, pair, column, num_pairs, ffn)
    tl.store(activated_PF + pair[:, None] * ffn + column[None, :], left * tl.sigmoid(left) * right * gate, mask=inside)


@triton.jit(launch_metadata=_backward_bytes, do_not_specialize=["num_pairs"])
def _activate_backward(
    hidden_PF, gates_P, activated_PF, d_hidden_PF, d_gates_P, num_pairs, ffn,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    gate = tl.load(gates_P + pair, mask=pair < num_pairs, other=0.0).to(tl.float32)[:, None]
    d_gate = tl.zeros([PAIRS], tl.float32)
    for first in range(0, ffn, WIDTH):
        column = first + tl.arange(0, WIDTH)
        inside, left, right = _halves(hidden_PF, pair, column, num_pairs, ffn)
        place = activated_PF + pair[:, None] * ffn + column[None, :]
        gradient = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(left)
        silu = left * sigmoid
        d_gate += tl.sum(gradient * silu * right, axis=1)
        tl.store(place, silu * right * gate, mask=inside)
        gradient *= gate
        d_left = d_hidden_PF + pair[:, None] * 2 * ffn + column[None, :]
        tl.store(d_left, gradient * right * sigmoid * (1 + left * (1 - sigmoid)), mask=inside)
        tl.store(d_left + ffn, gradient * silu, mask=inside)
    tl.store(d_gates_P + pair, d_gate, mask=pair < num_pairs)


@triton.jit
def _halves(hidden_PF, pair, column, num_pairs, ffn):
    """Return the mask of elements that exist, and the left and right halves in fp32, each `[pairs, columns]`."""
    inside = (pair < num_pairs)[:, None] & (column < ffn)[None, :]
    place = hidden_PF + pair[:, None] * 2 * ffn + column[None, :]
    left = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return inside, left, tl.load(place + ffn, mask=inside, other=0.0).to(tl.float32)
