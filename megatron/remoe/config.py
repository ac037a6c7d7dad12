"""Configuration of a ReMoE transformer: Megatron's own plus six fields."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.remoe.compatibility import relu_routing_problems


@dataclass
class ReMoEConfig(TransformerConfig):
    """`TransformerConfig` with ReLU routing.

    The fields carry the names of the command-line flags. `num_moe_experts`, `moe_router_topk` (k) and
    `moe_ffn_hidden_size` are meant after granularity: the target sparsity is `1 - k / num_moe_experts`.

    Raises:
        ValueError: a value is out of range, or a setting assumes exactly k experts per token.
    """

    moe_relu_routing: bool = False
    moe_relu_l1_reg_coeff_init: float = 1e-8
    moe_relu_l1_reg_coeff_multiplier: float = 1.2
    moe_relu_layer_floor: float = 1e-3
    moe_relu_activation_limit: float = 2.0
    moe_granularity: int = 1

    def __post_init__(self) -> None:
        problems = relu_routing_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        # Megatron insists on it for k = 1, where a softmax over one score is constant; ReLU has no softmax.
        self.moe_router_pre_softmax = True
        super().__post_init__()

    @property
    def target_sparsity(self) -> float:
        """Share of (token, expert) pairs that shall be inactive: 1 - k/E (paper section 3.3)."""
        assert self.num_moe_experts is not None
        return 1.0 - self.moe_router_topk / self.num_moe_experts
