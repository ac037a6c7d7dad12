"""The backend of Triton kernels: `--moe-kernels triton`. The same numbers as `pytorch.py`'s, in fewer passes.

T tokens, E experts, P pairs, H hidden size.
"""

from typing import NamedTuple

import torch

from megatron.remoe.kernels import plan, swiglu, token_sums
from megatron.remoe.kernels.backend import Backend
from megatron.remoe.kernels.router import relu_routing


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


def _count(map_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts_EB = plan.count_blocks(map_TE)
    return counts_EB.sum(dim=1, dtype=counts_EB.dtype), counts_EB  # another type would be one launch more


def _plan(
    probs_TE: torch.Tensor, map_TE: torch.Tensor, counts_EB: torch.Tensor, num_pairs: int
) -> tuple[TritonOrder, torch.Tensor]:
    token_index_P, by_token, gates_P = plan.fill(probs_TE, map_TE, counts_EB, num_pairs)
    return TritonOrder(token_index_P, by_token), gates_P


TRITON = Backend(relu_routing, _count, _plan, swiglu.activate, swiglu.activate_backward)
