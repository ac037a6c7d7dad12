"""The Triton backend, for `--moe-kernels triton`. It computes the same as `pytorch.py`, in fewer passes over memory.

T tokens, E experts, B blocks of tokens, P pairs, H hidden size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2

from megatron.remoe.kernels import gates, plan, swiglu
from megatron.remoe.kernels.interface import Backend

SUM_WIDTH = 1024  # columns that a program sums for a token


class TritonOrder(NamedTuple):
    """An `Order` that also has the rows of each token.

    Attributes:
        token_index_P: int32 `[P]`, the token of each pair.
        by_token: int32 `[T + 1 + P]`, the rows of each token's pairs, as `plan.fill` returns them.
    """

    token_index_P: torch.Tensor
    by_token: torch.Tensor

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        return tokens_TH.index_select(0, self.token_index_P)

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return sum_rows(pairs_PH, self.by_token)


def sum_rows(pairs: torch.Tensor, by_token: torch.Tensor) -> torch.Tensor:
    """Sum each token's pairs in fp32, in the order of the experts, and round once; moves `(P + T) · H` elements.

    Args:
        pairs: `[P, H]`.
        by_token: int32 `[T + 1 + P]`, as `plan.fill` returns it.

    Returns:
        `[T, H]`, of the type of `pairs`.
    """
    num_pairs, hidden = pairs.shape
    num_tokens = by_token.shape[0] - 1 - num_pairs
    sums = pairs.new_empty(num_tokens, hidden)
    width = min(next_power_of_2(hidden), SUM_WIDTH)
    _sum[(num_tokens, cdiv(hidden, width))](pairs.contiguous(), by_token, sums, hidden, WIDTH=width)
    return sums


def _plan(
    probs_TE: torch.Tensor, map_TE: torch.Tensor, counts_EB: torch.Tensor, num_pairs: int
) -> tuple[TritonOrder, torch.Tensor]:
    token_index_P, by_token, gates_P = plan.fill(probs_TE, map_TE, counts_EB, num_pairs)
    return TritonOrder(token_index_P, by_token), gates_P


@triton.jit
def _sum(pairs_PH, by_token, sums_TH, hidden, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for place in range(tl.load(by_token + token), tl.load(by_token + token + 1)):
        row = tl.load(by_token + place).to(tl.int64)
        total += tl.load(pairs_PH + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(sums_TH + token * hidden + column, total, mask=column < hidden)


TRITON = Backend(gates.gate, gates.gate_backward, plan.count_blocks, _plan, swiglu.activate, swiglu.activate_backward)
