"""Scale normalized gates (NormRouter of UniPool, arXiv 2605.06665).

    u = l / ‖l‖                         the normalized logits; they do not depend on the size of the logits l
    g = s · c · ReLU(u)                 s is learned and starts at 1
    c = 1 / √E[Σ of the k largest ReLU(u_e)²]      for independent, normally distributed logits

So at the start, the squares of a token's k largest gates have a mean sum of 1. The paper averages the inverse roots
instead. That mean is infinite if a token can have no positive logit.
"""

import functools

import torch

from megatron.core.transformer.transformer_config import TransformerConfig


class GateScale(torch.nn.Module):
    """Multiply gates by s · c.

    Attributes:
        scale: the parameter s, `[1]`.
        initial: the number c.
    """

    def __init__(self, config: TransformerConfig, like: torch.Tensor) -> None:
        """
        Args:
            config: has E, k and whether sequences are split.
            like: a tensor with the dtype and device of s.
        """
        super().__init__()
        assert config.num_moe_experts is not None
        self.scale = torch.nn.Parameter(like.new_ones(1))
        self.scale.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.initial = initial_scale(config.num_moe_experts, config.moe_router_topk)

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Return the scaled gates, in their dtype."""
        return gates * (self.scale * self.initial).to(gates.dtype)


@functools.cache
def initial_scale(num_experts: int, topk: int) -> float:
    """Return c for E experts and the k largest gates of a token.

    Length and direction of normally distributed logits are independent, and E[‖l‖²] is E. So the mean sum of squares
    is 1/E of that of the logits themselves, ∫₀^∞ 2x · E[min(N, k)] dx, where N of the E logits are above x.
    """
    x = torch.linspace(0.0, 12.0, 12_001, dtype=torch.float64)
    above = torch.distributions.Binomial(num_experts, 0.5 * torch.erfc(x / 2**0.5).unsqueeze(1))
    fewer = torch.arange(topk, dtype=torch.float64)
    mean_number = topk - (above.log_prob(fewer).exp() * (topk - fewer)).sum(dim=1)
    return float((torch.trapezoid(2 * x * mean_number, x) / num_experts).rsqrt())
