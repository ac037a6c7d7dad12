"""Scores of a whole sequence, for routers that compare its tokens.

T tokens (sequence x batch), E experts.
"""

import torch

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def gather_sequence(
    scores: torch.Tensor, padding_mask: torch.Tensor | None, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Return the scores of all tokens of each sequence, without gradient and with padding last.

    Args:
        scores: `[sequence, batch, E]`, at least 0, of this rank's tokens.
        padding_mask: bool `[sequence, batch]`, True at padding, which gets -1.
        group: the tensor (sequence) and context parallel ranks that a sequence may be split over.

    Returns:
        `[whole sequence, batch, E]` of the dtype of `scores`; rank r has the r-th of the group's equal parts.
    """
    scores = scores.detach()
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask.unsqueeze(-1), -1.0)
    return scores if group.size() == 1 else gather_from_sequence_parallel_region(scores, group=group)
