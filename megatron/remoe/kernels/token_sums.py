"""Sum each token's rows without atomics, so that results are reproducible.

T tokens, P pairs, H hidden size; a program computes a part of one token's sum.
"""

import torch
import triton
import triton.language as tl

from megatron.remoe.kernels import cdiv, next_power_of_2

WIDTH = 1024


def sum_rows(pairs: torch.Tensor, by_token: torch.Tensor) -> torch.Tensor:
    """Add up in fp32, in the order of the experts, and round once; moves `(P + T) · H` elements.

    Args:
        pairs: `[P, H]`.
        by_token: int32 `[T + 1 + P]`, as `plan.fill` returns it.

    Returns:
        `[T, H]`, of the type of `pairs`.
    """
    num_pairs, hidden = pairs.shape
    num_tokens = by_token.shape[0] - 1 - num_pairs
    sums = pairs.new_empty(num_tokens, hidden)
    width = min(next_power_of_2(hidden), WIDTH)
    _sum[(num_tokens, cdiv(hidden, width))](pairs.contiguous(), by_token, sums, hidden, WIDTH=width)
    return sums


@triton.jit
def _sum(pairs_PH, by_token, sums_TH, hidden, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for place in range(tl.load(by_token + token), tl.load(by_token + token + 1)):
        row = tl.load(by_token + place).to(tl.int64)
        total += tl.load(pairs_PH + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(sums_TH + token * hidden + column, total, mask=column < hidden)
