"""Sequence-level top-k (Wen et al., arXiv 2511.06494): a sequence of S tokens shares its S · k choices.

T tokens (sequence x batch), E experts.
"""

from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter
from megatron.remoe.baselines.whole_sequence import gather_sequence


class SequenceTopKRouter(TopKRouter):
    """Takes the S · k largest softmax scores of a sequence, whichever tokens have them; the auxiliary loss is top-k's.

    In training a token's experts depend on later tokens. In evaluation they do not, as in the paper's online variant:
    token t takes those of its scores that are among the t · k largest of the first t tokens.
    """

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the tokens of each sequence; gates are the softmax over all experts."""
        logits = self.apply_z_loss(logits, None if padding_mask is None else padding_mask.reshape(-1))
        scores = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ranked = gather_sequence(scores, padding_mask, self.tp_cp_group)
        taken = self._of_sequence(ranked) if self.training else self._so_far(ranked)
        map_TE = taken.chunk(self.tp_cp_group.size())[self.tp_cp_group.rank()].reshape(-1, self.num_experts)
        scores_TE = scores.view(-1, self.num_experts)
        if padding_mask is not None:
            is_token_T = ~padding_mask.reshape(-1, 1)
            map_TE, scores_TE = map_TE & is_token_T, scores_TE * is_token_T
        probs_TE = torch.where(map_TE, scores_TE, 0.0)
        if self.training and torch.is_grad_enabled():
            probs_TE = self._apply_aux_loss(probs_TE, scores_TE, map_TE, with_padding_mask=padding_mask is not None)
        return probs_TE.to(logits.dtype), map_TE

    def _of_sequence(self, ranked: torch.Tensor) -> torch.Tensor:
        """Return whether each score is among the S · k largest of its sequence: bool `[sequence, batch, E]`."""
        length, batch, experts = ranked.shape
        flat = ranked.transpose(1, 2).reshape(length * experts, batch)
        chosen = flat.topk(length * self.topk, dim=0).indices
        taken = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, chosen, True)
        return taken.view(length, experts, batch).transpose(1, 2)

    def _so_far(self, ranked: torch.Tensor) -> torch.Tensor:
        """Return whether each score is among the t · k largest up to its token: bool `[sequence, batch, E]`."""
        return torch.stack([self._of_sequence(ranked[:end])[-1] for end in range(1, len(ranked) + 1)])
