"""Configuration of a ReMoE for transformers, and of the dense and top-k models that it is compared with."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig


@strict
class RemoeConfig(LlamaConfig):
    """`LlamaConfig` with experts that are chosen by ReLU (arXiv 2412.14711), top-k or hash, or without experts.

    Raises:
        StrictDataclassError: experts per token are not 1 to `num_experts`, or settings contradict each other.
    """

    model_type = "remoe"
    _auto_class = "AutoConfig"

    qk_norm: Literal["head"] | None = None
    """The queries and keys of each "head" have an RMSNorm (Qwen3)."""
    num_experts: int = 0
    """Experts of a layer, granularity included; 0: a dense model."""
    num_experts_per_tok: int = 1
    """k: the experts of each token, with ReLU routing the mean that L1 aims at."""
    moe_intermediate_size: int = 0
    """Hidden size of an expert."""
    shared_expert_intermediate_size: int = 0
    """Hidden size of the experts that all tokens share; 0: there are none."""
    shared_expert_gate: bool = False
    """The shared experts have a sigmoid gate (Qwen2-MoE)."""
    mlp_only_layers: tuple[int, ...] | list[int] = ()
    """Layers without experts, from 0."""
    moe_relu_routing: bool = True
    """Gates are ReLU(x W) and an expert is active where its gate is positive; False: top-k of scores."""
    moe_relu_normalize: bool = False
    """ReLU routing: logits are divided by their length, and gates multiplied by a learned scale (arXiv 2605.06665)."""
    moe_relu_load_balancing: bool = True
    """ReLU routing: the L1 term weighs each expert by its load."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """Top-k routing: scores are a softmax over the experts, or the "sigmoid" of each logit."""
    norm_topk_prob: bool = False
    """Top-k routing: the k gates add up to 1 (Megatron without --moe-router-pre-softmax; sigmoids always, if k > 1)."""
    routed_scaling_factor: float = 1.0
    """Top-k routing: a factor on the gates."""
    router_expert_bias: bool = False
    """Top-k of sigmoids: add a bias to each score, only to choose the experts (arXiv 2408.15664)."""
    hash_routing: bool = False
    """The k experts follow from the token's id, with gates of 1 (arXiv 2106.04426); needs moe_relu_routing False."""
    router_dtype: str | None = None
    """The router's type, for instance "float32"; None: the model's."""
    max_experts_per_token: int | None = None
    """ReLU routing: only the K largest gates count, and K experts are computed for every token, so that shapes are
    fixed for compilers and servers. None: exactly the active experts, however many."""
    target_experts_per_token: int | None = None
    """k, if num_experts_per_tok is K: servers read the number of computed experts there."""
    output_router_logits: bool = False
    """Return router logits, L1 term and sparsity, and add λ times the term to a loss."""
    router_aux_loss_coef: float = 0.0
    """λ, or the coefficient of top-k routing's load balancing loss."""

    @property
    def mean_experts_per_token(self) -> int:
        """k: the number of experts per token; with ReLU routing, the mean that the L1 term holds."""
        return self.target_experts_per_token or self.num_experts_per_tok

    def validate_architecture(self) -> None:
        """Check the experts' settings. Unlike in Llama, the number of heads need not divide the hidden size."""
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}: must be 1 to {self.num_experts}.")
        if self.max_experts_per_token is not None and not 1 <= self.max_experts_per_token <= self.num_experts:
            raise ValueError(f"max_experts_per_token={self.max_experts_per_token}: must be 1 to {self.num_experts}.")
        if self.router_expert_bias and self.scoring_func != "sigmoid":
            raise ValueError("router_expert_bias=True: needs scoring_func='sigmoid'.")
        if self.hash_routing and self.moe_relu_routing:
            raise ValueError("hash_routing=True: needs moe_relu_routing=False.")
