"""Expert choice (Zhou et al., arXiv 2202.09368): each expert chooses its tokens.

T tokens (sequence x batch), E experts.
"""

import torch

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.router import TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes the same number of tokens of a sequence, those with its largest scores.

    It sees the future: whether a token is taken depends on later tokens of its sequence. So its losses are not those
    of a language model, and it cannot generate text.
    """

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route k · sequence / E tokens of each sequence to each expert; gates are the softmax over the experts."""
        padding_mask_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits.view(-1, self.num_experts), padding_mask_T).view_as(logits)
        scores = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        ranked = scores.detach()
        if padding_mask is not None:
            ranked = ranked.masked_fill(padding_mask.unsqueeze(-1), -1.0)  # padding comes last
        if self.tp_cp_group.size() > 1:  # rank r has the r-th of the group's equal parts of the sequence
            ranked = gather_from_sequence_parallel_region(ranked, group=self.tp_cp_group)
        capacity = max(1, len(ranked) * self.topk // self.num_experts)
        taken = torch.zeros_like(ranked, dtype=torch.bool).scatter_(0, ranked.topk(capacity, dim=0).indices, True)
        routing_map = taken.chunk(self.tp_cp_group.size())[self.tp_cp_group.rank()]
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        probs = torch.where(routing_map, scores, 0.0).to(logits.dtype)
        return probs.view(-1, self.num_experts), routing_map.reshape(-1, self.num_experts)
