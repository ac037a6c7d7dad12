"""Routing-free experts (Liu et al., arXiv 2604.00801): each expert decides by its own score.

    G_e(x) = ReLU(s_e · |x A_e| - b_e)      A_e: hidden x r, r = hidden/4; s_e and b_e are learned too
    active where G_e(x) ≥ θ, with the gate G_e(x)
    loss   = λ · mean of G_e(x) · (μ · share of the tokens that e has + (1 - μ) · share of the experts that x has)
             over tokens and experts, where inactive pairs count 0
    λ      ← λ · (1 + η)^sign(active pairs - k · tokens) after each step, over all layers

T tokens (sequence x batch), E experts.
"""

import math
from typing import Any

import torch

from megatron.core.transformer.moe.router import TopKRouter

# The settings of the authors' code. Its λ is at most 1.
THRESHOLD, MU, FIRST_LAMBDA, ETA = 1.0, 0.5, 1e-5, 0.2
LARGEST_EXPONENT = math.floor(-math.log(FIRST_LAMBDA) / math.log(1 + ETA))


class RoutingFreeRouter(TopKRouter):
    """Routes a token to the experts whose projection of it is long enough; all of them at first.

    In the paper the product of A_e and a second matrix is the expert's own gate projection. Here experts keep
    Megatron's, so A_e is extra. The loss is that of each layer, while the paper's share of experts is over all layers.
    Weights start with a standard deviation of 1/√hidden, so that |x A_e| is about √r at any size.

    Attributes:
        weight: `[E · r, hidden]`, the A_e.
        scale, shift: `[E]`, s_e and b_e.
        exponent: int64 scalar n of λ = FIRST_LAMBDA · (1 + ETA)^n: half-precision wrappers cast floats.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        hidden, experts = self.config.hidden_size, self.num_experts
        self.bias = None
        self.weight = torch.nn.Parameter(torch.empty(experts * max(1, hidden // 4), hidden, dtype=torch.float32))
        self.reset_parameters()
        if self.config.perform_initialization:
            torch.nn.init.normal_(self.weight, std=hidden**-0.5)
        for name, value in (("scale", 1.0), ("shift", 0.0)):
            parameter = torch.nn.Parameter(torch.full((experts,), value, dtype=self.config.params_dtype))
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
            setattr(self, name, parameter)
        device = torch.cuda.current_device()
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64, device=device))

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_unused: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route each token to the experts whose score reaches θ; gates are the scores.

        Logits are `[sequence, batch, E · r]`, x A.
        """
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        lengths_TE = torch.linalg.vector_norm(
            logits.view(-1, self.num_experts, logits.shape[-1] // self.num_experts), dim=-1
        )
        scores_TE = self.apply_z_loss(lengths_TE * self.scale - self.shift, padding_mask=padding_T)
        map_TE = scores_TE.detach() >= THRESHOLD
        if padding_T is not None:
            map_TE = map_TE & ~padding_T.unsqueeze(-1)
        probs_TE = torch.where(map_TE, scores_TE, 0.0).to(logits.dtype)
        if self.training and torch.is_grad_enabled():
            probs_TE = self._with_loss(probs_TE, map_TE, padding_T)
        return probs_TE, map_TE

    def _with_loss(self, probs_TE: torch.Tensor, map_TE: torch.Tensor, padding_T: torch.Tensor | None) -> torch.Tensor:
        """Return the gates with the gradient of the loss; the ranks that share a sequence add theirs up."""
        own_tokens = map_TE.new_full((), len(map_TE), dtype=torch.float32)
        if padding_T is not None:
            own_tokens = own_tokens - padding_T.sum()
        sums = torch.cat([map_TE.sum(dim=0).float(), own_tokens.unsqueeze(0)])
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(sums, group=self.tp_cp_group)
        tokens = sums[-1].clamp(min=1.0)
        share_of_tokens_E, share_of_experts_T = sums[:-1] / tokens, map_TE.float().mean(dim=1)
        weights_TE = MU * share_of_tokens_E + (1 - MU) * share_of_experts_T.unsqueeze(-1)
        coefficient = FIRST_LAMBDA * (1 + ETA) ** self.exponent.float()
        loss = coefficient * (probs_TE.float() * weights_TE).sum() / (tokens * self.num_experts)
        return self.attach_and_log_load_balancing_loss(
            probs_TE, coefficient, loss, "load_balancing_loss", self.tp_cp_group, valid_token_count=own_tokens
        )

    def end_step(self, pairs: torch.Tensor, tokens: torch.Tensor) -> None:
        """Move λ, by what all routers of all ranks have seen in the step.

        Args:
            pairs: active ones, a float64 scalar.
            tokens: times layers, a float64 scalar.
        """
        step = torch.sign(pairs - self.topk * tokens).to(torch.int64)
        self.exponent.copy_((self.exponent + step).clamp(max=LARGEST_EXPONENT))
