"""The backend of Triton kernels: `--moe-kernels triton`. The same numbers as `pytorch.py`'s, in fewer passes.

T tokens, E experts, B blocks of tokens, P pairs, H hidden size.
"""

from typing import NamedTuple

import torch

from megatron.remoe.kernels import plan, router, swiglu, token_sums
from megatron.remoe.kernels.interface import Backend


class TritonOrder(NamedTuple):
    """An `Order` that knows the rows of each token too.

    Attributes:
        token_index_P: int32 `[P]`, the token of each pair.
        by_token: int32 `[T + 1 + P]`, the pairs of each token, as `plan.fill` returns them.
    """

    token_index_P: torch.Tensor
    by_token: torch.Tensor

    def take(self, tokens_TH: torch.Tensor) -> torch.Tensor:
        return tokens_TH.index_select(0, self.token_index_P)

    def sum(self, pairs_PH: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return token_sums.sum_rows(pairs_PH, self.by_token)


def _plan(
    probs_TE: torch.Tensor, map_TE: torch.Tensor, counts_EB: torch.Tensor, num_pairs: int
) -> tuple[TritonOrder, torch.Tensor]:
    token_index_P, by_token, gates_P = plan.fill(probs_TE, map_TE, counts_EB, num_pairs)
    return TritonOrder(token_index_P, by_token), gates_P


TRITON = Backend(router.gate, router.gate_backward, plan.count_blocks, _plan, swiglu.activate, swiglu.activate_backward)
