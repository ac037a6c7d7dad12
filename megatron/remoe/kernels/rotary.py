"""Rotary position embedding: one pass over queries or keys each way, wherever their heads lie.

S positions, B sequences, N heads, D their size, R angles: the first 2 · R elements of a head are rotated.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2

TILE = 1024  # elements that a program rotates at once


class _Rotated(torch.autograd.Function):
    """Rotate each pair of elements by the angle of its position; moves `2 · S · B · N · D` elements.

    Args:
        x: `[S, B, N, D]`.
        cos, sin: `[S, R]`, contiguous.
        interleaved: a pair are neighbours, instead of elements i and i + R.

    Returns:
        A contiguous tensor of the shape and type of `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.tables, ctx.interleaved = (cos, sin), interleaved
        return _rotated(x, cos, sin, interleaved, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.tables
        return _rotated(gradient, cos, sin, ctx.interleaved, back=True), None, None, None


rotate = _Rotated.apply


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool) -> torch.Tensor:
    (positions, batch, heads, size), angles = x.shape, cos.shape[1]
    if x.stride(3) != 1:
        x = x.contiguous()
    rotated = torch.empty((positions, batch, heads, size), dtype=x.dtype, device=x.device)
    width = next_power_of_2(angles)
    rows = min(next_power_of_2(batch * heads), max(1, TILE // width))
    _rotate[(positions, cdiv(batch * heads, rows))](
        x, cos, sin, rotated, batch, heads, x.stride(0), x.stride(1), x.stride(2),
        D=size, R=angles, ROWS=rows, WIDTH=width, REST=next_power_of_2(size - 2 * angles) if size > 2 * angles else 0,
        INTERLEAVED=interleaved, BACK=back,
    )  # fmt: skip
    return rotated


@triton.jit
def _rotate(
    x, cos_SR, sin_SR, y, batch, heads, of_position, of_sequence, of_head,
    D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotate some heads of a position; `of_position`, `of_sequence` and `of_head` are the strides of `x`."""
    position = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < batch * heads
    start = position * of_position + (row // heads).to(tl.int64) * of_sequence + (row % heads) * of_head
    end = (position * batch * heads + row) * D
    angle = tl.arange(0, WIDTH)
    first = angle * 2 if INTERLEAVED else angle
    second = first + 1 if INTERLEAVED else first + R
    cos = tl.load(cos_SR + position * R + angle, mask=angle < R, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_SR + position * R + angle, mask=angle < R, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    mask = is_row[:, None] & (angle < R)[None, :]
    left = tl.load(x + start[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + start[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + end[:, None] + first[None, :], left * cos - right * sin, mask=mask)
    tl.store(y + end[:, None] + second[None, :], left * sin + right * cos, mask=mask)
    if REST > 0:
        column = 2 * R + tl.arange(0, REST)
        mask = is_row[:, None] & (column < D)[None, :]
        tl.store(
            y + end[:, None] + column[None, :], tl.load(x + start[:, None] + column[None, :], mask=mask), mask=mask
        )
